"""Qwen-Image, Qwen-Image 2.1, Nucleus-Image and Krea 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.backbones.call import Masked, Packed, Parts, is_fake, trimmed, unwrap
from davae.backbones.family import ATTENTION, BOTH, CP, JOINT, OUT, Family


class QwenImageCall(Packed, Masked):
    """Call of Qwen-Image with packed tokens (c,2,2).

    The model makes positions from the shape of the grid.
    """

    TEXT_TOKENS = 512
    GUIDANCE = 1.0  # the input of a guidance-distilled model in training

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return self.padded(*pipeline.encode_prompt(captions, max_sequence_length=self.TEXT_TOKENS, **options))

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = trimmed(*parts)
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            timestep=t,
            guidance=torch.full_like(t, self.GUIDANCE) if config["guidance_embeds"] else None,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


class QwenImage21Call(Masked):
    """Call of Qwen-Image 2.1, where every latent position is a token.

    Four tokens share a slot in the sequence of the text encoder.
    """

    TEXT_TOKENS = 1024
    WIDTH = "context_in_dim"

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask, _ = pipeline.encode_prompt(captions, **options)
        return self.padded(embeds, mask)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = trimmed(*parts)
        height, width = x_t.shape[-2:]
        if is_fake(x_t):
            return self._unpack(counted_pass(unwrap(model), self.pack(x_t), t, embeds), x_t)
        image = torch.arange(embeds.shape[1] + height * width // 4, device=x_t.device) >= embeds.shape[1]
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw,c)
            encoder_hidden_states=embeds,
            timestep=t,
            img_shapes=[[(1, height, width)]] * len(x_t),
            img_mask=image.expand(len(x_t), -1),  # (B,L+hw/4)
            encoder_hidden_states_mask=mask,
            return_dict=False,
        )[0]
        return self._unpack(tokens, x_t)

    def _unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return the last hw of the tokens (B,L+hw,c) as latents (B,c,h,w) of the size of `like`."""
        height, width = like.shape[-2:]
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)


def counted_pass(model: Any, image: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Run Qwen-Image 2.1's layers on tensors without values, to count FLOPs.

    Its own forward pass reads numbers of tokens off its masks. Rotations and masks are not products and are left out.

    Args:
        model: the transformer, without a wrapper.
        image, t, text: (B,hw,c), (B,), (B,L,d).

    Returns:
        (B,L+hw,c).
    """
    hidden = model.img_in(image)
    joint = torch.cat([model.txt_in(text), hidden], dim=1)
    temb = model.time_text_embed(t, hidden)
    modulation = model.modulation(temb)
    for block in model.transformer_blocks:
        # text sees text before it, the image sees all
        joint = block(hidden_states=joint, modulation=modulation, segments=[(0, text.shape[1], True)])
    return model.proj_out(model.norm_out(joint, temb, None))


class NucleusImageCall(Packed, Masked):
    """Call of Nucleus-Image, close to that of Qwen-Image.

    The model predicts data - noise and counts time from data to noise.
    """

    TEXT_TOKENS = 1024

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        return self.padded(*pipeline.encode_prompt(captions, max_sequence_length=self.TEXT_TOKENS, **options))

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = trimmed(*parts)
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            img_shapes=[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)] * len(x_t),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=t,
            return_dict=False,
        )[0]
        return -self.unpack(tokens, x_t)


class Krea2Call(Packed):
    """Call of Krea 2 with text from several layers of the encoder.

    Text and image share one list of positions, all 0 for the text.
    """

    TEXT_TOKENS = 512

    def embed(self, pipeline: Any, captions: list[str], options: dict[str, Any]) -> Parts:
        embeds, mask = pipeline.encode_prompt(captions, **options)
        return embeds, mask.to(embeds)  # (B,L,n,d), (B,L)

    def blank(self, config: Any) -> Parts:
        shape = (1, self.TEXT_TOKENS, config["num_text_layers"], config["text_hidden_dim"])
        return torch.empty(shape), torch.ones(1, self.TEXT_TOKENS)

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        embeds, mask = parts
        tokens = model(
            hidden_states=self.pack(x_t),  # (B,hw/4,4c)
            encoder_hidden_states=embeds,
            timestep=t,
            position_ids=F.pad(self.grid(x_t).float(), (0, 0, embeds.shape[1], 0)),  # (L+hw/4,3)
            encoder_attention_mask=mask.bool(),
            return_dict=False,
        )[0]
        return self.unpack(tokens, x_t)


QWEN = (
    Family(
        "QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        embedder="img_in",
        head="proj_out",
        head_order=CP,
        lora_targets=(
            *ATTENTION,
            *JOINT,
            "img_mlp.net.0.proj",
            "img_mlp.net.2",
            "txt_mlp.net.0.proj",
            "txt_mlp.net.2",
        ),
        packed=4,
        attributes=OUT,
        patch_key=None,
        guidance="true_cfg_scale",
        negative_prompts=True,
        call=QwenImageCall(),
    ),
    Family(
        "QwenImage21Transformer2DModel",
        pipeline="QwenImage21Pipeline",
        embedder="img_in",
        head="proj_out",
        head_order=CP,
        lora_targets=(*ATTENTION, "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
        attributes=OUT,
        grid=2,
        guidance="true_cfg_scale",
        negative_prompts=True,
        default_pixels=1024,
        upgraded_pipelines=("DetailQwenImage21Pipeline",),
        call=QwenImage21Call(),
    ),
    Family(
        "NucleusMoEImageTransformer2DModel",
        pipeline="NucleusMoEImagePipeline",
        embedder="img_in",
        head="proj_out",
        head_order=CP,
        lora_targets=(*ATTENTION, "add_k_proj", "add_v_proj", "img_mlp.net.0.proj", "img_mlp.net.2", "encoder_proj"),
        packed=4,
        attributes=OUT,
        patch_key=None,
        call=NucleusImageCall(),
    ),
    Family(
        "Krea2Transformer2DModel",
        pipeline="Krea2Pipeline",
        embedder="img_in",
        head="final_layer.linear",
        head_order=CP,
        lora_targets=(*ATTENTION, "ff.gate", "ff.up", "ff.down"),
        packed=4,
        attributes=BOTH,
        patch_key=None,
        no_guidance=0.0,
        default_pixels=1024,
        upgraded_pipelines=("DetailKrea2Pipeline",),
        call=Krea2Call(),
    ),
)
