"""Stock pipelines that have a size or the factor of their base autoencoder in their code, for upgraded models."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import AuraFlowPipeline, Lumina2Pipeline, LuminaPipeline

SIZES = ("height", "width")
SHIFT_LENGTHS = {"base_image_seq_len": 256, "max_image_seq_len": 4096}  # the stock pipeline's defaults


class BasePixels:
    """Turns sizes into pixels of the base picture, which are what the stock code counts in.

    The stock pipeline has 8 pixels per latent position in its code, for latents and for all it works out from sizes
    (positions, attention scale, allowed sizes). An upgraded autoencoder has s times as many; so this asks the stock code for
    the base picture, 1/s as high and wide: the same tokens, which the autoencoder decodes to the size that was asked for.
    """

    vae: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the stock pipeline; `height` and `width` in pixels of the picture, by default s times the base's.

        Raises:
            ValueError: a size that is no multiple of s.
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
    """LuminaPipeline for an upgraded model. The stock one takes every autoencoder for one of factor 8 (see BasePixels).

    Like the stock pipeline it guides the first three channels only, which are the base's.
    """


class DetailLumina2Pipeline(BasePixels, Lumina2Pipeline):
    """Lumina2Pipeline for an upgraded model. The stock one takes every autoencoder for one of factor 8 (see BasePixels).

    It also takes the timestep shift from the number of latent *channels*, where the number of tokens was meant. An upgraded
    model has D channels more and the same tokens; here it keeps the shift that the base pipeline gives those tokens.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the stock pipeline; sizes as in BasePixels."""
        own = {key: self.scheduler.config.get(key, default) for key, default in SHIFT_LENGTHS.items()}
        detail = self.vae.layout.detail_channels
        # the shift is linear in channels between these two: moved by D, it is the same at C+D as it was at C
        self.scheduler.register_to_config(**{key: length + detail for key, length in own.items()})
        try:
            return super().__call__(*args, **options)
        finally:
            self.scheduler.register_to_config(**own)


class DetailAuraFlowPipeline(AuraFlowPipeline):
    """AuraFlowPipeline for an upgraded model. The stock one draws 1024 pixels, whatever the autoencoder, if it is not told.

    For an upgraded model that would be a quarter of the tokens; here the default is s times as high and wide.
    """

    vae: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the stock pipeline; `height` and `width` are by default s times its own."""
        stock = inspect.signature(super().__call__)
        arguments = stock.bind(*args, **options).arguments
        for name in SIZES:
            arguments.setdefault(name, stock.parameters[name].default * self.vae.layout.scale)
        return super().__call__(**arguments)


# diffusers looks classes up on the library that is imported, and `import davae` is what people write
DetailAuraFlowPipeline.__module__ = "davae"
DetailLuminaPipeline.__module__ = "davae"
DetailLumina2Pipeline.__module__ = "davae"
