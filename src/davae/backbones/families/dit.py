"""Class-conditional models: DiT, and LightningDiT, which also runs weights of SiT and DiT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from davae.backbones.call import ClassNumbers, Parts
from davae.backbones.family import ATTENTION, DDPM, MLP, OUT, PC, Family


class DiTCall(ClassNumbers):
    """DiT: epsilon and a variance."""

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return model(x_t, timestep=t, class_labels=parts[0], return_dict=False)[0][:, : x_t.shape[1]]


class LightningDiTCall(ClassNumbers):
    """Call of LightningDiT, which predicts a velocity, or epsilon with the weights of DiT.

    The time of a velocity runs from noise to data.
    """

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        if config["prediction_type"] == "epsilon":
            return model(x_t, t, parts[0], return_dict=False)[0][:, : x_t.shape[1]]
        return -model(x_t, 1 - t, parts[0], return_dict=False)[0]


DIT = (
    Family(
        "LightningDiT",
        pipeline="ClassConditionalPipeline",
        embedder="x_embedder.proj",
        head="final_layer.linear",
        head_order=PC,
        lora_targets=("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2"),
        condition="class",
        fixed=("pos_embed",),
        objectives=("flow", "epsilon"),
        classes_key="num_classes",
        call=LightningDiTCall(),
        blocks="blocks",
        detail_time="detail_time",
        detail_head=True,
    ),
    Family(
        "DiTTransformer2DModel",
        pipeline="DiTPipeline",
        embedder="pos_embed.proj",
        head="proj_out_2",
        head_order=PC,
        lora_targets=(*ATTENTION, *MLP),
        attributes=OUT,
        condition="class",
        objectives=DDPM,
        classes_key="num_embeds_ada_norm",
        call=DiTCall(),
    ),
)
