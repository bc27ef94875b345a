"""HiDream-I1, PRX and AuraFlow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn

from davae.backbones.call import Call, Parts, is_fake
from davae.backbones.family import ATTENTION, BOTH, CP, JOINT, OUT, PC, Family


class HiDreamCall(Call):
    """Call of HiDream-I1 with embeddings of T5, of every Llama layer and pooled ones.

    The model predicts data - noise and takes timesteps to 1000.

    The Llama part is large: 32 layers x 128 tokens x 4096 values, 34 MB a caption in a float16 cache.
    """

    TEXT_TOKENS = 128

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return t5, llama.transpose(0, 1), pooled  # (B,L,d), (B,layers,L,e), (B,f)

    def blank(self, config: Any) -> Parts:
        t5_width, llama_width = config["caption_channels"][:2]
        layers = max(config["llama_layers"]) + 1
        return (
            torch.empty(1, self.TEXT_TOKENS, t5_width),
            torch.empty(1, layers, self.TEXT_TOKENS, llama_width),
            torch.empty(1, config["text_emb_dim"]),
        )

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        t5, llama, pooled = parts
        if is_fake(x_t):
            _spread_evenly(model)
        # outside training mode its experts pass no gradient back, and sizes are read from tensors
        model.train((torch.is_grad_enabled() or is_fake(x_t)) and not config["force_inference_output"])
        prediction = model(
            hidden_states=x_t,
            timesteps=t * 1000,
            encoder_hidden_states_t5=t5,
            encoder_hidden_states_llama3=llama.transpose(0, 1),
            pooled_embeds=pooled,
            return_dict=False,
        )[0]
        if model.training:  # the class returns patches then: (B,c,hw/pp,pp)
            p = config["patch_size"]
            height, width = x_t.shape[-2] // p, x_t.shape[-1] // p
            patches = prediction[:, :, : height * width].unflatten(3, (p, p)).unflatten(2, (height, width))
            prediction = patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (B,c,h,w)
        return -prediction


def _spread_evenly(model: nn.Module) -> None:
    """Send every token to the first experts while FLOPs are counted.

    Without values the model cannot choose experts.
    """
    for module in model.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.forward = _first_experts(module)


def _first_experts(module: Any) -> Any:
    chosen = list(module.experts)[: module.num_activated_experts]

    def forward(x: Tensor) -> Tensor:
        module.gate(x)
        return module.shared_experts(x) + sum(expert(x) for expert in chosen)

    return forward


class PRXCall(Call):
    """Call of PRX with masked prompts and timesteps in (0,1)."""

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return embeds, mask  # (B,L,d), (B,L)

    def blank(self, config: Any) -> Parts:
        return torch.empty(1, self.TEXT_TOKENS, config["context_in_dim"]), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        return model(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=embeds,
            attention_mask=mask.bool(),
            return_dict=False,
        )[0]


class AuraFlowCall(Call):
    """Call of AuraFlow with timesteps in (0,1).

    The pipeline sets the padding of prompts to zero.
    """

    TEXT_TOKENS = 256

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, _, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)
        return (embeds,)  # (B,L,d)

    def blank(self, config: Any) -> Parts:
        return (torch.empty(1, self.TEXT_TOKENS, config["joint_attention_dim"]),)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        (embeds,) = parts
        return model(x_t, encoder_hidden_states=embeds, timestep=t, return_dict=False)[0]


OTHERS = (
    Family(
        "HiDreamImageTransformer2DModel",
        pipeline="HiDreamImagePipeline",
        embedder="x_embedder.proj",
        head="final_layer.linear",
        head_order=PC,
        lora_targets=("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "w1", "w2", "w3"),
        embedder_order=PC,
        attributes=OUT,
        fixed_side=128,
        call=HiDreamCall(),
    ),
    Family(
        "PRXTransformer2DModel",
        pipeline="PRXPipeline",
        embedder="img_in",
        head="final_layer.linear",
        head_order=CP,
        lora_targets=("img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"),
        attributes=BOTH,
        no_guidance=1.0,
        scaled_options=("default_sample_size",),
        call=PRXCall(),
    ),
    Family(
        "AuraFlowTransformer2DModel",
        pipeline="AuraFlowPipeline",
        embedder="pos_embed.proj",
        head="proj_out",
        head_order=PC,
        lora_targets=(*ATTENTION, *JOINT, "ff(_context)?.(linear_1|linear_2|out_projection)"),
        attributes=OUT,
        default_pixels=1024,
        upgraded_pipelines=("DetailAuraFlowPipeline",),
        call=AuraFlowCall(),
    ),
)
