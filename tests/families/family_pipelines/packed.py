"""Tiny pipelines of transformers that see 2x2 positions packed into one token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import tiny_autoencoder, tiny_recipe
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    BriaPipeline,
    ChromaPipeline,
    ErnieImagePipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    Krea2Pipeline,
    LongCatImagePipeline,
    NucleusMoEImagePipeline,
    OvisImagePipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from family_models import CASES
from transformers import Qwen2VLImageProcessor, Qwen3ForCausalLM, Qwen3Model, Qwen3VLProcessor, Qwen3VLVideoProcessor

from davae.tasks.text_to_image import build_silent_t5, build_silent_tokenizer
from family_pipelines.parts import (
    chat_tokenizer,
    clip_encoder,
    clip_tokenizer,
    lively,
    mistral3,
    qwen2_vl,
    qwen3,
    qwen3_vl,
    t5_encoder,
    t5_tokenizer,
)


def shifting() -> FlowMatchEulerDiscreteScheduler:
    """Timesteps shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def transformer(name: str, **changes: Any) -> Any:
    return CASES[name].build(name, **changes)


def packed_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae.eval()


VIDEO: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}


def flux(folder: Path) -> None:
    clip, t5 = clip_encoder(), build_silent_t5(tiny_recipe().architecture)
    transformer = CASES["FluxTransformer2DModel"].build(
        "FluxTransformer2DModel",
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=clip.config.hidden_size,
        guidance_embeds=True,
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_autoencoder(),
        text_encoder=clip,
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=build_silent_tokenizer(),
    ).save_pretrained(folder)


def flux2(folder: Path) -> None:
    Flux2Pipeline(
        transformer=transformer("Flux2Transformer2DModel", joint_attention_dim=24, guidance_embeds=True),
        scheduler=shifting(),
        vae=packed_autoencoder(),
        text_encoder=mistral3(30),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def flux2_klein(folder: Path) -> None:
    Flux2KleinPipeline(
        transformer=transformer("Flux2Transformer2DModel", joint_attention_dim=24, guidance_embeds=False),
        scheduler=shifting(),
        vae=packed_autoencoder(),
        text_encoder=qwen3(Qwen3ForCausalLM, 27),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def chroma(folder: Path) -> None:
    ChromaPipeline(
        transformer=transformer("ChromaTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


def qwen_image(folder: Path) -> None:
    QwenImagePipeline(
        transformer=transformer("QwenImageTransformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen2_vl(),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def vision_processor() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}
    )
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def qwen_image21(folder: Path) -> None:
    QwenImage21Pipeline(
        transformer=transformer("QwenImage21Transformer2DModel"),
        scheduler=shifting(),
        # the pipeline has 16 pixels per position in its code
        vae=lively(
            AutoencoderKLQwenImage21(
                **{**VIDEO, "dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [True, False, False, False]},
                decoder_base_dim=8,
            )
        ),
        text_encoder=qwen3_vl(),
        processor=vision_processor(),
    ).save_pretrained(folder)


def z_image(folder: Path) -> None:
    ZImagePipeline(
        transformer=transformer("ZImageTransformer2DModel", axes_lens=[1024, 64, 64]),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen3(Qwen3Model, 2),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def ovis(folder: Path) -> None:
    OvisImagePipeline(
        transformer=transformer("OvisImageTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen3(Qwen3Model, 1),
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def long_cat(folder: Path) -> None:
    LongCatImagePipeline(
        transformer=transformer("LongCatImageTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=qwen2_vl(),
        tokenizer=chat_tokenizer(),
        text_processor=chat_tokenizer(),
    ).save_pretrained(folder)


def bria(folder: Path) -> None:
    BriaPipeline(
        transformer=transformer("BriaTransformer2DModel"),
        scheduler=shifting(),
        vae=tiny_autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


def ernie(folder: Path) -> None:
    ErnieImagePipeline(
        transformer=transformer("ErnieImageTransformer2DModel"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=packed_autoencoder(),
        text_encoder=mistral3(2).model,
        tokenizer=chat_tokenizer(),
    ).save_pretrained(folder)


def krea2(folder: Path) -> None:
    Krea2Pipeline(
        transformer=transformer("Krea2Transformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen3_vl().model,
        tokenizer=chat_tokenizer(),
        text_encoder_select_layers=(0, 1),
    ).save_pretrained(folder)


def nucleus(folder: Path) -> None:
    NucleusMoEImagePipeline(
        transformer=transformer("NucleusMoEImageTransformer2DModel"),
        scheduler=shifting(),
        vae=lively(AutoencoderKLQwenImage(**VIDEO)),
        text_encoder=qwen3_vl(layers=8),  # the pipeline reads the eighth from the end
        processor=vision_processor(),
    ).save_pretrained(folder)


# a name may say more after the class: another pipeline of it
BUILDERS: dict[str, Callable[[Path], None]] = {
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "Flux2Transformer2DModel (Klein)": flux2_klein,
    "ChromaTransformer2DModel": chroma,
    "QwenImageTransformer2DModel": qwen_image,
    "QwenImage21Transformer2DModel": qwen_image21,
    "ZImageTransformer2DModel": z_image,
    "OvisImageTransformer2DModel": ovis,
    "LongCatImageTransformer2DModel": long_cat,
    "BriaTransformer2DModel": bria,
    "ErnieImageTransformer2DModel": ernie,
    "Krea2Transformer2DModel": krea2,
    "NucleusMoEImageTransformer2DModel": nucleus,
}
