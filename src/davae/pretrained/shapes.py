"""Shapes of a base pipeline, read from its configs or from the pipeline itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from davae.backbones.expand import MARK
from davae.backbones.families import component_in, denoiser, family_by_class, family_of, supported
from davae.backbones.family import longest_side, patch_size
from davae.errors import ModelError
from davae.pretrained.open import Configs, class_name
from davae.pretrained.stored import check_config, loading
from davae.vae.base import autoencoder_family, base_channels, spatial_factor
from davae.vae.detail_vae import DetailVAE

LEGACY: dict[tuple[str, Any], str] = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}


@dataclass(frozen=True)
class BaseShapes:
    """Classes, sizes and configs of a base pipeline, read from its configs alone."""

    pipeline_class: str
    transformer_class: str
    vae_class: str
    channels: int  # C
    vae_factor: int  # f: pixels per latent position
    patch_size: int  # p: latent positions per token, each way
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]


def read_shapes(model: str | Configs, *, to_train: bool = True) -> BaseShapes:
    """Read the shapes of a diffusers pipeline from its configs.

    Args:
        model: a folder, hub id or preset, or its configs.
        to_train: refuse a family that can only be expanded, and a pipeline that does not draw from a prompt alone.

    Raises:
        ModelError: not a diffusers pipeline, an unsupported class, or a model that was upgraded already.
    """
    configs = Configs.of(model)
    with loading(f"model {configs.model}"):
        return _read_shapes(configs, to_train)


def _read_shapes(configs: Configs, to_train: bool) -> BaseShapes:
    model, index = configs.model, configs.index
    part = component_in(index)
    if part is None or "vae" not in index:
        raise ModelError(f"model {model} ({index.get('_class_name')}) has no transformer or U-Net and vae to upgrade")
    vae_class = index["vae"][1]
    transformer, vae = configs.read(part), configs.read("vae")
    check_config(transformer, f"{part} of model {model}")
    check_config(vae, f"vae of model {model}")
    # the official folders of DiT and PixArt name the class they had before it was split
    named = str(index[part][1])
    transformer_class = LEGACY.get((named, transformer.get("norm_type")), named)
    if vae_class == "DetailVAE" or MARK in transformer:
        raise ModelError(f"model {model} was upgraded already; start from its pretrained base")
    try:
        family = family_by_class(transformer_class)
        autoencoder_family(vae_class)
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    if to_train and not family.trains:
        raise ModelError(
            f"model {model}: expand_transformer widens a {transformer_class}, but davae cannot train one yet; "
            f"it can train {', '.join(row.class_name for row in supported() if row.trains)}"
        )
    pipeline = class_name(index.get("_class_name", "DiffusionPipeline"))
    if to_train:
        family.check_pipeline(pipeline, f"model {model}")
    channels = base_channels(vae, vae_class)
    taken = int(transformer[family.in_key]) // family.packed
    if taken != channels:
        raise ModelError(
            f"model {model}: the transformer takes {taken} channels and the vae gives {channels}; "
            "it was expanded already, or the parts do not belong together"
        )
    return BaseShapes(
        pipeline_class=pipeline,
        transformer_class=transformer_class,
        vae_class=vae_class,
        channels=channels,
        vae_factor=spatial_factor(vae, vae_class),
        patch_size=patch_size(transformer, family),
        transformer_config=transformer,
        vae_config=vae,
    )


def pixel_factor(pipeline: Any) -> int:
    """Return the pixels per latent position of a pipeline's autoencoder, each way."""
    return spatial_factor(pipeline.vae.config, type(pipeline.vae).__name__)


def token_side(pipeline: Any) -> int:
    """Return the pixels of an image token of a pipeline's denoiser, each way."""
    model = denoiser(pipeline)
    return pixel_factor(pipeline) * patch_size(model.config, family_of(model))


def check_drawable(pipeline: Any, height: int, width: int) -> None:
    """Refuse a size in pixels that a model has no positions for, or that its pipeline rescales.

    Raises:
        ModelError: names the size to use.
    """
    side, longest, step = max(height, width), longest_side(denoiser(pipeline).config), token_side(pipeline)
    if longest is not None and side > longest * step:
        raise ModelError(f"{side} pixels are more than this model has positions for; use {longest * step} at most")
    if family_of(pipeline).fixed_side is not None:
        own = pipeline.default_sample_size * pixel_factor(pipeline)
        scale = math.sqrt(own**2 / (width * height))  # as its pipeline does
        if any(int(pixels * scale // step * step) != pixels for pixels in (height, width)):
            raise ModelError(f"this model draws {own} x {own} pixels in all, not {width} x {height}; use {own}")


def default_resolution(pipeline: Any) -> int:
    """Return the pixels of the image that a pipeline is made for, each way.

    They are those that an upgrade was trained on, else the default of the pipeline or its transformer. A stock pipeline
    has that default alone: an upgrade from another size than the base's own needs `height` and `width` there.
    """
    if isinstance(pipeline.vae, DetailVAE) and pipeline.vae.config.get("resolution"):
        return int(pipeline.vae.config["resolution"])
    model = denoiser(pipeline)
    family = family_of(model)
    if family.default_pixels is not None:
        return family.default_pixels * (pipeline.vae.layout.scale if isinstance(pipeline.vae, DetailVAE) else 1)
    side: Any = getattr(pipeline, "default_sample_size", None) or model.config["sample_size"]
    height = side if isinstance(side, int) else side[0]  # U-Nets may have a rectangle
    if "default_sample_size" in family.scaled_options:
        return height
    factor = pixel_factor(pipeline)
    if "sample_size" in family.scaled_config and isinstance(pipeline.vae, DetailVAE):
        factor //= pipeline.vae.layout.scale  # sample_size was multiplied by s instead
    return height * factor
