"""Tiny pipelines of models trained by DDPM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from conftest import tiny_recipe
from diffusers import AutoencoderKL, CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler
from family_models import CASES
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from davae import ClassConditionalPipeline, LightningDiT
from davae.tasks.text_to_image import build_text_encoder
from family_pipelines.parts import clip_encoder, clip_tokenizer

WIDTH = 16  # of every text encoder


def autoencoder(levels: int = 2) -> Any:
    """An AutoencoderKL as these families have it: quant convolutions, a scale, no shift."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    ).eval()


def t5_encoder() -> Any:
    config = T5Config(vocab_size=len(clip_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def scheduler() -> Any:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def pixart(folder: Path, pipeline: str = "PixArtAlphaPipeline", sample_size: int = 32) -> None:
    # hidden size a multiple of 3, among which size and aspect ratio are split
    transformer = CASES["PixArtTransformer2DModel"].build(
        "PixArtTransformer2DModel",
        caption_channels=WIDTH,
        sample_size=sample_size,
        num_attention_heads=3,
        cross_attention_dim=12,
    )
    getattr(diffusers, pipeline)(
        tokenizer=clip_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=scheduler(),
    ).save_pretrained(folder)


def hunyuan_dit(folder: Path) -> None:
    transformer = CASES["HunyuanDiT2DModel"].build(
        "HunyuanDiT2DModel", cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, text_len=77, text_len_t5=256
    )
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    diffusers.HunyuanDiTPipeline(
        vae=autoencoder(levels=4),  # the stock pipeline has factor 8 in its code
        text_encoder=BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer,
    ).save_pretrained(folder)


def dit(folder: Path) -> None:
    transformer = CASES["DiTTransformer2DModel"].build("DiTTransformer2DModel", num_embeds_ada_norm=1000)
    names = {"0": "a red square, square", "1": "a blue square", "7": "a disc"}
    pipeline = diffusers.DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False), id2label=names)
    pipeline.register_to_config(id2label=names)  # diffusers would forget them
    pipeline.save_pretrained(folder)


def converted_dit(folder: Path) -> None:
    """What `davae convert dit` makes of DiT's official weights."""
    model = LightningDiT(
        input_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=2,
        prediction_type="epsilon",
        learn_sigma=True,
    )
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    ClassConditionalPipeline(
        autoencoder(),
        model.eval(),
        DDPMScheduler(variance_type="learned_range", clip_sample=False),
        class_names=["a red square", "a blue square"],
    ).save_pretrained(folder)


def cogview3(folder: Path) -> None:
    transformer = CASES["CogView3PlusTransformer2DModel"].build(
        "CogView3PlusTransformer2DModel", text_embed_dim=WIDTH
    )
    diffusers.CogView3PlusPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ).save_pretrained(folder)


def stable_diffusion(folder: Path) -> None:
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=CASES["UNet2DConditionModel"].build("UNet2DConditionModel", cross_attention_dim=WIDTH),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_xl(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    second = build_text_encoder(tiny_recipe().architecture, tokenizer).eval()
    unet = CASES["UNet2DConditionModel"].build(
        "UNet2DConditionModel",
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + second.config.projection_dim,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "PixArtTransformer2DModel": pixart,
    "HunyuanDiT2DModel": hunyuan_dit,
    "DiTTransformer2DModel": dit,
    "CogView3PlusTransformer2DModel": cogview3,
    "UNet2DConditionModel": stable_diffusion,
}
# other pipelines of the same classes
VARIANTS: dict[str, Callable[[Path], None]] = {
    "PixArt-Sigma": partial(pixart, pipeline="PixArtSigmaPipeline"),
    "PixArt-alpha at 1024 pixels": partial(pixart, sample_size=128),
    "DiT, official weights": converted_dit,
    "SDXL": stable_diffusion_xl,
}
