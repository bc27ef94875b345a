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

from davae.backbones.families.pixart import rotary_table

SIZES = ("height", "width")
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


class BasePixels:
    """Counts sizes in pixels of the base image, which are what the stock code needs.

    The stock pipeline has 8 pixels per latent position in its code, for latents and for all it works out from sizes
    (positions, attention scale, allowed sizes). An upgraded autoencoder has s times as many; so the stock code is called for
    the base image, 1/s as high and wide: the same tokens, which the autoencoder decodes to the size that was given.
    """

    vae: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the stock pipeline with `height` and `width` in pixels of the upgraded image.

        By default they are s times the base's.

        Raises:
            ValueError: a size that is not a multiple of s.
        """
        stock = super().__call__  # type: ignore[misc]
        arguments = inspect.signature(stock).bind(*args, **options).arguments
        scale = self.vae.layout.scale
        for name in SIZES:
            pixels = arguments.get(name)
            if pixels is not None and pixels % scale:
                raise ValueError(f"{name} is {pixels}; it must be divisible by {scale}")
            arguments[name] = None if pixels is None else pixels // scale
        return stock(**arguments)


class DetailLuminaPipeline(BasePixels, LuminaPipeline):
    """Lumina-Next for an upgraded model.

    The stock pipeline has a factor of 8 in its code (see BasePixels). Like the stock pipeline, this one guides only the
    first three channels, which are the base's.
    """


class DetailLumina2Pipeline(BasePixels, Lumina2Pipeline):
    """Lumina-Image 2.0 for an upgraded model.

    The stock pipeline has a factor of 8 in its code (see BasePixels). It also takes the timestep shift from the number of
    latent *channels*, where the number of tokens was meant. An upgraded model has D channels more and the same tokens;
    here it keeps the shift that the base pipeline gives those tokens.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the stock pipeline, with sizes as in BasePixels."""
        own = {key: self.scheduler.config.get(key, default) for key, default in SHIFT_LENGTHS.items()}
        detail = self.vae.layout.detail_channels
        # the shift is linear in channels between these two: moved by D, it is the same at C+D as it was at C
        self.scheduler.register_to_config(**{key: length + detail for key, length in own.items()})
        try:
            return super().__call__(*args, **options)
        finally:
            self.scheduler.register_to_config(**own)


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

    def __call__(
        self,
        prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        *args: Any,
        target_size: tuple[int, int] | None = None,
        use_resolution_binning: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run the stock pipeline, with `target_size` in pixels of the base.

        `target_size` and `use_resolution_binning` are given by name.
        """
        scale = self.vae.layout.scale
        default = self.default_sample_size * self.vae_scale_factor
        rows, columns = (height or default) // scale // 16 * 16, (width or default) // scale // 16 * 16  # the base's
        if use_resolution_binning and (rows, columns) not in SUPPORTED_SHAPE:
            columns, rows = map_to_standard_shapes(columns, rows)
        handle = self.transformer.register_forward_pre_hook(follow_latents, with_kwargs=True)
        try:
            return super().__call__(
                prompt,
                rows * scale,
                columns * scale,
                *args,
                target_size=target_size or (rows, columns),
                use_resolution_binning=False,
                **kwargs,
            )
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


# a pipeline's model_index.json names its class; diffusers finds it among the names of a library that is imported
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
