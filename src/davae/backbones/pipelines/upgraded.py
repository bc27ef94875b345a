"""Stock pipelines whose code fixes a number that an upgrade changes, with that number made to follow the autoencoder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from diffusers import (
    ErnieImagePipeline,
    Krea2Pipeline,
    LongCatImagePipeline,
    QwenImage21Pipeline,
    ZImagePipeline,
)
from diffusers.image_processor import VaeImageProcessor


def sized(call: Callable[..., Any], pixels: int, *names: str) -> Callable[..., Any]:
    """A pipeline's call whose `names` are `pixels` x s where they are not given, s being the upgrade's scale."""

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(call).bind(self, *args, **options).arguments
        for name in names:
            if given.get(name) is None:
                given[name] = pixels * self.vae.layout.scale
        return call(**given)

    return wrapped


class DetailZImagePipeline(ZImagePipeline):
    """Z-Image's pipeline draws 1024 pixels when no size is asked for, whatever its autoencoder: here 1024 x s.

    The same tokens as the base's. The stock pipeline runs the same folder where height and width are given.
    """

    __call__ = sized(ZImagePipeline.__call__, 1024, "height", "width")


class DetailQwenImage21Pipeline(QwenImage21Pipeline):
    """Qwen-Image 2.1's pipeline has 16 pixels per latent position and a default of 1024 pixels in its code.

    Here the factor is the autoencoder's and the default 1024 x s. The stock pipeline makes latents s times too large a side
    and returns a picture of s times the size that was asked for.
    """

    @functools.wraps(QwenImage21Pipeline.__init__)  # diffusers reads the components off the signature
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.vae_scale_factor = self.vae.spatial_factor
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels
        )

    __call__ = sized(QwenImage21Pipeline.__call__, 1024, "output_resolution")


class DetailErnieImagePipeline(ErnieImagePipeline):
    """ERNIE-Image's pipeline draws 1024 pixels when no size is asked for: here 1024 x s.

    The stock pipeline runs the same folder where height and width are given.
    """

    __call__ = sized(ErnieImagePipeline.__call__, 1024, "height", "width")


class DetailKrea2Pipeline(Krea2Pipeline):
    """Krea 2's pipeline draws 1024 pixels when no size is asked for: here 1024 x s.

    The stock pipeline runs the same folder where height and width are given.
    """

    __call__ = sized(Krea2Pipeline.__call__, 1024, "height", "width")


class DetailLongCatImagePipeline(LongCatImagePipeline):
    """LongCat-Image's pipeline has the 16 channels of its base's latents in its code: here they are the transformer's."""

    def prepare_latents(self, batch_size: int, num_channels_latents: int, *args: Any, **options: Any) -> Any:
        channels = self.transformer.config.in_channels // 4
        return super().prepare_latents(batch_size, channels, *args, **options)


# as DetailVAE: a folder names these classes' home
for _pipeline in (
    DetailErnieImagePipeline,
    DetailKrea2Pipeline,
    DetailLongCatImagePipeline,
    DetailQwenImage21Pipeline,
    DetailZImagePipeline,
):
    _pipeline.__module__ = "davae"
