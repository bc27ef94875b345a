"""Pipelines that follow an upgraded autoencoder.

They are subclasses of stock pipelines whose code fixes a number that an upgrade changes.

Everywhere s is the upgrade's scale and D its number of detail channels. All subclasses see the same tokens as the base.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    ErnieImagePipeline,
    HunyuanDiTPipeline,
    Krea2Pipeline,
    LongCatImagePipeline,
    Lumina2Pipeline,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImage21Pipeline,
    ZImagePipeline,
)
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import SUPPORTED_SHAPE, map_to_standard_shapes
from torch import Tensor

from davae.backbones.families.pixart import rotary_table

SIZES = ("height", "width")
TINY = 1e-7  # next to a velocity of unit variance: float16 holds it
SHIFT_LENGTHS = {"base_image_seq_len": 256, "max_image_seq_len": 4096}  # Lumina2Pipeline's defaults

# -- a default size in pixels ------------------------------------------------------------------------------------------


def sized(call: Callable[..., Any], pixels: int, *names: str) -> Callable[..., Any]:
    """Return a pipeline's `__call__` with a default size that follows the upgrade.

    Args:
        call: the stock `__call__`.
        pixels: the stock default.
        names: arguments that are `pixels` x s where they are missing or None.
    """

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(call).bind(self, *args, **options).arguments
        for name in names:
            if given.get(name) is None:
                given[name] = pixels * self.vae.layout.scale
        return call(**given)

    return wrapped


class DetailAuraFlowPipeline(AuraFlowPipeline):
    """AuraFlow for an upgraded model, with 1024 x s pixels by default.

    The stock default of 1024 gives a quarter of the tokens at s = 2.
    """

    __call__ = sized(AuraFlowPipeline.__call__, 1024, *SIZES)


class DetailZImagePipeline(ZImagePipeline):
    """Z-Image for an upgraded model, with 1024 x s pixels by default.

    The stock pipeline has 1024 in its code. It runs the same folder where height and width are given.
    """

    __call__ = sized(ZImagePipeline.__call__, 1024, *SIZES)


class DetailErnieImagePipeline(ErnieImagePipeline):
    """ERNIE-Image for an upgraded model, with 1024 x s pixels by default.

    The stock pipeline has 1024 in its code. It runs the same folder where height and width are given.
    """

    __call__ = sized(ErnieImagePipeline.__call__, 1024, *SIZES)


class DetailKrea2Pipeline(Krea2Pipeline):
    """Krea 2 for an upgraded model, with 1024 x s pixels by default.

    The stock pipeline has 1024 in its code. It runs the same folder where height and width are given.
    """

    __call__ = sized(Krea2Pipeline.__call__, 1024, *SIZES)


class DetailQwenImage21Pipeline(QwenImage21Pipeline):
    """Qwen-Image 2.1 for an upgraded model, with 1024 x s pixels by default.

    Pixels per latent position are those of the autoencoder.

    The stock pipeline has 16 pixels per latent position in its code: its latents are s times too high and wide, and the image
    has s times the size that was given.
    """

    @functools.wraps(QwenImage21Pipeline.__init__)  # diffusers reads the components off the signature
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.vae_scale_factor = self.vae.spatial_factor
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels
        )

    __call__ = sized(QwenImage21Pipeline.__call__, 1024, "output_resolution")


# -- 8 pixels per latent position --------------------------------------------------------------------------------------


def in_base_pixels(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pipeline's `__call__` that runs for the base image, 1/s as high and wide.

    The stock pipeline has 8 pixels per latent position in its code, for latents and for all it works out from sizes
    (positions, attention scale, allowed sizes). An upgraded autoencoder has s times as many, and decodes the base's tokens to
    the size that was given. By default it is s times the base's. A size that is not a multiple of s is a ValueError.

    Args:
        call: the stock `__call__`.
    """

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(call).bind(self, *args, **options).arguments
        scale = self.vae.layout.scale
        for name in SIZES:
            pixels = given.get(name)
            if pixels is not None and pixels % scale:
                raise ValueError(f"{name} is {pixels}; it must be divisible by {scale}")
            given[name] = None if pixels is None else pixels // scale
        return call(**given)

    return wrapped


class DetailLuminaPipeline(LuminaPipeline):
    """Lumina-Next for an upgraded model.

    The stock pipeline has a factor of 8 in its code (see in_base_pixels). Like the stock pipeline, this one guides only the
    first three channels, which are the base's.
    """

    __call__ = in_base_pixels(LuminaPipeline.__call__)


class DetailLumina2Pipeline(Lumina2Pipeline):
    """Lumina-Image 2.0 for an upgraded model.

    The stock pipeline has a factor of 8 in its code (see in_base_pixels). It also takes the timestep shift from the number of
    latent *channels*, where the number of tokens was meant. An upgraded model has D channels more and the same tokens;
    here it keeps the shift that the base pipeline gives those tokens. Its guidance divides by the norms of rows, which are
    zero in the detail before training (see without_zero_rows).
    """

    @functools.wraps(Lumina2Pipeline.__call__)
    def __call__(self, *args: Any, **options: Any) -> Any:
        own = {key: self.scheduler.config.get(key, default) for key, default in SHIFT_LENGTHS.items()}
        detail = self.vae.layout.detail_channels
        # the shift is linear in channels between these two: moved by D, it is the same at C+D as it was at C
        self.scheduler.register_to_config(**{key: length + detail for key, length in own.items()})
        handle = self.transformer.register_forward_hook(without_zero_rows)
        try:
            return in_base_pixels(Lumina2Pipeline.__call__)(self, *args, **options)
        finally:
            handle.remove()
            self.scheduler.register_to_config(**own)


def without_zero_rows(
    model: torch.nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Fill rows of a prediction (B,c,h,w) that are exactly zero, so that no norm is zero.

    This is a hook that runs after the pass; `args` and `output` are those of the pass.
    """
    prediction = output[0]
    return (prediction.masked_fill((prediction == 0).all(-1, keepdim=True), TINY), *output[1:])


# -- a number of channels ----------------------------------------------------------------------------------------------


class DetailLongCatImagePipeline(LongCatImagePipeline):
    """LongCat-Image for an upgraded model, with the transformer's latent channels.

    The stock pipeline has 16 channels in its code.
    """

    def prepare_latents(self, batch_size: int, num_channels_latents: int, *args: Any, **options: Any) -> Any:
        channels = self.transformer.config.in_channels // 4
        return super().prepare_latents(batch_size, channels, *args, **options)


# -- a table of sizes --------------------------------------------------------------------------------------------------


class ScaledBins(PixArtImageProcessor):
    """The base's table of sizes, all its sides times s."""

    def __init__(self, vae_scale_factor: int, scale: int):
        super().__init__(vae_scale_factor=vae_scale_factor)
        self.scale = scale

    def classify_height_width_bin(self, height: int, width: int, ratios: dict) -> tuple[int, int]:  # type: ignore[override]
        """Return height and width in pixels of the entry nearest in aspect ratio."""
        rows, columns = PixArtImageProcessor.classify_height_width_bin(height, width, ratios)
        return rows * self.scale, columns * self.scale


class _ScaledTable:
    """Base of pipelines that use ScaledBins.

    The arguments are named because diffusers reads the parts of a pipeline off them.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)  # type: ignore[call-arg]
        self.image_processor = ScaledBins(vae.spatial_factor, vae.layout.scale)


class DetailPixArtAlphaPipeline(_ScaledTable, PixArtAlphaPipeline):
    """PixArt-alpha for an upgraded model: its table of sizes is scaled.

    The stock pipeline draws every image at a size out of a table of the *base's* pixels and enlarges it: an upgrade
    from 1024 to 2048 would draw 1024. With `use_resolution_binning=False` it draws the right size too.
    """


class DetailPixArtSigmaPipeline(_ScaledTable, PixArtSigmaPipeline):
    """PixArt-Sigma for an upgraded model, with a scaled table of sizes.

    `DetailPixArtAlphaPipeline` explains the reason.
    """


class DetailHunyuanDiTPipeline(HunyuanDiTPipeline):
    """Hunyuan-DiT for an upgraded model, with positions of its latents and scaled sizes.

    The stock pipeline makes the table of rotary positions for latents of 8 pixels a side, a number in its code, and fails
    on any others; it also has a table of the base's sizes, and passes the image's size to the model. Here the model gets the
    base's size, as in training.
    """

    @functools.wraps(HunyuanDiTPipeline.__call__)
    def __call__(self, *args: Any, **options: Any) -> Any:
        given = inspect.signature(HunyuanDiTPipeline.__call__).bind(self, *args, **options).arguments
        scale = self.vae.layout.scale
        default = self.default_sample_size * self.vae_scale_factor
        rows, columns = ((given.get(name) or default) // scale // 16 * 16 for name in SIZES)  # the base's
        if given.get("use_resolution_binning", True) and (rows, columns) not in SUPPORTED_SHAPE:
            columns, rows = map_to_standard_shapes(columns, rows)
        given |= {"height": rows * scale, "width": columns * scale, "use_resolution_binning": False}
        given["target_size"] = given.get("target_size") or (rows, columns)  # in pixels of the base
        handle = self.transformer.register_forward_pre_hook(follow_latents, with_kwargs=True)
        try:
            return HunyuanDiTPipeline.__call__(**given)
        finally:
            handle.remove()


def follow_latents(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Give a pass of Hunyuan-DiT the positions of its latents (B,c,h,w).

    This is a hook that runs before the pass.

    Args:
        model: the transformer.
        args, kwargs: arguments of the pass, latents first.
    """
    height, width = args[0].shape[-2:]
    return args, {**kwargs, "image_rotary_emb": rotary_table(model.config, height, width, args[0].device)}


# their public place: a folder is opened by its class, `davae.DetailZImagePipeline.from_pretrained`, because
# `DiffusionPipeline.from_pretrained` looks for the class that model_index.json names in diffusers alone
for _pipeline in (
    DetailAuraFlowPipeline,
    DetailErnieImagePipeline,
    DetailHunyuanDiTPipeline,
    DetailKrea2Pipeline,
    DetailLongCatImagePipeline,
    DetailLumina2Pipeline,
    DetailLuminaPipeline,
    DetailPixArtAlphaPipeline,
    DetailPixArtSigmaPipeline,
    DetailQwenImage21Pipeline,
    DetailZImagePipeline,
):
    _pipeline.__module__ = "davae"
