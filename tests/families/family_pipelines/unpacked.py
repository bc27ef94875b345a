"""Tiny pipelines of flow-matching transformers that take latents as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from conftest import tiny_autoencoder, tiny_recipe
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SCMScheduler
from family_models import CASES
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from davae.tasks.text_to_image import build_text_encoder
from family_pipelines.parts import clip_tokenizer, word_tokenizer

WIDTH = 8  # of every text encoder: what the tiny transformers of family_models take
LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def tiny_dc() -> AutoencoderDC:
    """SANA's autoencoder at its own factor of 32."""
    widths = (4, 4, 4, 8, 8, 8)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    ).eval()


def save(
    folder: Path, name: str, pipeline: str, *, vae: Any = None, scheduler: Any = None, model: Any = None, **parts: Any
) -> None:
    """Write the pipeline of a tiny transformer; `model` changes its config."""
    getattr(diffusers, pipeline)(
        transformer=CASES[name].build(name, **(model or {})),
        vae=vae or tiny_autoencoder(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    ).save_pretrained(folder)


def gemma() -> dict[str, Any]:
    return {"text_encoder": Gemma2Model(Gemma2Config(**LAYERS)).eval(), "tokenizer": word_tokenizer()}


def sana(folder: Path) -> None:
    model = {"sample_size": 16, "interpolation_scale": 1}
    save(folder, "SanaTransformer2DModel", "SanaPipeline", vae=tiny_dc(), model=model, **gemma())


def sana_sprint(folder: Path) -> None:
    model = {"sample_size": 32, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    save(
        folder,
        "SanaTransformer2DModel",
        "SanaSprintPipeline",
        vae=tiny_dc(),
        scheduler=scheduler,
        model=model,
        **gemma(),
    )


def aura_flow(folder: Path) -> None:
    config = UMT5Config(vocab_size=64, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config).eval()
    save(
        folder,
        "AuraFlowTransformer2DModel",
        "AuraFlowPipeline",
        text_encoder=encoder,
        tokenizer=word_tokenizer(),
    )


def lumina2(folder: Path) -> None:
    # the shift that the stock pipeline takes from the channels matters with a dynamic scheduler only
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    # the text's positions: the system prompt alone has 40 words
    model = {"axes_lens": [300, 16, 16]}
    vae = tiny_autoencoder(levels=4)
    save(folder, "Lumina2Transformer2DModel", "Lumina2Pipeline", vae=vae, scheduler=scheduler, model=model, **gemma())


def lumina_next(folder: Path) -> None:
    save(folder, "LuminaNextDiT2DModel", "LuminaPipeline", vae=tiny_autoencoder(levels=4), **gemma())


def cogview4(folder: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
    )
    save(
        folder,
        "CogView4Transformer2DModel",
        "CogView4Pipeline",
        vae=tiny_autoencoder(levels=4),
        scheduler=scheduler,
        text_encoder=GlmModel(GlmConfig(**LAYERS)).eval(),
        tokenizer=word_tokenizer(padding_side="left"),
    )


def hidream(folder: Path) -> None:
    # the pipeline draws 128 x 128 latent positions, whatever it is asked for: few large tokens, and a factor of one
    tokenizer = clip_tokenizer(128)
    architecture = tiny_recipe().architecture.model_copy(update={"text_tokens": 128})
    clip = build_text_encoder(architecture, tokenizer)
    model = {
        "patch_size": 64,
        "text_emb_dim": 2 * clip.config.projection_dim,
        "max_resolution": [128, 128],
    }
    llama = LlamaForCausalLM(LlamaConfig(**LAYERS, attn_implementation="eager")).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    save(
        folder,
        "HiDreamImageTransformer2DModel",
        "HiDreamImagePipeline",
        vae=tiny_autoencoder(levels=1, attention=False),
        model=model,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=word_tokenizer(),
        text_encoder_4=llama,
        tokenizer_4=word_tokenizer(),
    )


def prx(folder: Path) -> None:
    # a saved T5GemmaEncoder is read back at the published size whatever its config says, so a tiny one cannot be
    parts = {**gemma(), "tokenizer": word_tokenizer(model_max_length=16)}
    save(folder, "PRXTransformer2DModel", "PRXPipeline", default_sample_size=256, **parts)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "SanaTransformer2DModel": sana,
    "AuraFlowTransformer2DModel": aura_flow,
    "Lumina2Transformer2DModel": lumina2,
    "LuminaNextDiT2DModel": lumina_next,
    "CogView4Transformer2DModel": cogview4,
    "HiDreamImageTransformer2DModel": hidream,
    "PRXTransformer2DModel": prx,
}
