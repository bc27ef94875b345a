"""DetailVAE: a frozen base encoder, a new detail encoder and one decoder, as a diffusers autoencoder (Sec. 3.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.models import by_rows
from davae.models.autoencoder_families import autoencoder_family, first_convolution, layer_path, spatial_factor
from davae.models.families import model_class
from davae.models.resample import DetailDown, DetailUp
from davae.models.tiling import Tiling, tiled
from davae.models.warm_start import load_all_but, narrow_posterior, warm_start_up

Downsample = Literal["antialias", "bicubic"]
Encode = Callable[[Tensor], Tensor]


class StructuredPosterior(DiagonalGaussianDistribution):
    """Posterior of [z, z_d]: z is certain (the base's mode), z_d a diagonal Gaussian. Normalised, (B,C+D,h,w)."""

    def __init__(self, parameters: Tensor, layout: LatentLayout):
        super().__init__(parameters)
        self.std, self.var = (self._certain_base(spread, layout) for spread in (self.std, self.var))

    @staticmethod
    def _certain_base(spread: Tensor, layout: LatentLayout) -> Tensor:
        z, z_d = layout.split(spread)
        return layout.join(torch.zeros_like(z), z_d)


@dataclass(frozen=True)
class RawLatents:
    """Before normalisation: z (B,C,h,w), and mean and log-variance of z_d (B,D,h,w)."""

    z: Tensor
    mean: Tensor
    logvar: Tensor


def downsample(images: Tensor, scale: int, mode: Downsample = "antialias") -> Tensor:
    """I from I_hr: (B,3,s*H,s*W) -> (B,3,H,W), bicubic, with antialiasing unless mode is `bicubic`."""
    size = (images.shape[-2] // scale, images.shape[-1] // scale)
    dtype = images.dtype if images.dtype in (torch.float32, torch.float64) else torch.float32
    small = F.interpolate(images.to(dtype), size, mode="bicubic", align_corners=False, antialias=mode == "antialias")
    return small.to(images.dtype)


class DetailVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A detail-aligned VAE that speaks normalised latents (`scaling_factor` 1, `shift_factor` 0).

    Make one from a pretrained autoencoder with `from_base`; the arguments are what its config stores.

    Args:
        base_class, base_config: diffusers class of the base autoencoder and its config.
        detail_channels: D, a multiple of the base's C.
        scale: s, ratio of the high resolution to the base resolution; a power of two.
        downsample: how I is made from I_hr.
        base_mean, base_std: per channel; z is normalised as the pretrained transformer expects it.
        detail_mean, detail_std: per channel, measured over the training set.

    Raises:
        ValueError: unsupported base, D not a multiple of C, scale not a power of two.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResnetBlock2D",)

    @register_to_config
    def __init__(
        self,
        base_class: str,
        base_config: dict[str, Any],
        detail_channels: int,
        scale: int = 2,
        downsample: Downsample = "antialias",
        base_mean: list[float] | None = None,
        base_std: list[float] | None = None,
        detail_mean: list[float] | None = None,
        detail_std: list[float] | None = None,
        block_out_channels: list[int] | None = None,
        encoder_block_out_channels: list[int] | None = None,
        latent_channels: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        family = autoencoder_family(base_class)
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, at least 2, found {scale}")
        base = model_class(base_class).from_config(base_config)
        base_channels = int(base.config["latent_channels"])
        self.layout = LatentLayout(base_channels, detail_channels, scale)
        widths = list(base.config[family.widths])
        self.spatial_factor = spatial_factor(base.config, base_class) * scale  # pixels per latent position, each way
        self.register_to_config(
            # pipelines take the spatial factor from the length of either list
            block_out_channels=[*widths, *widths[-1:] * int(math.log2(scale))],
            encoder_block_out_channels=[*widths, *widths[-1:] * int(math.log2(scale))],
            latent_channels=self.layout.channels,
            sample_size=int(base.config.get("sample_size") or 32 * self.spatial_factor // scale) * scale,
        )

        self.base_encoder = base.encoder
        self.base_quant_conv = base.quant_conv if family.quant and base.quant_conv is not None else nn.Identity()
        self.detail_encoder = copy.deepcopy(base.encoder)
        self.decoder = base.decoder
        self._last, self._first = layer_path(base.encoder, family.last), layer_path(base.decoder, family.first)
        width = self.detail_encoder.get_submodule(self._last).in_channels
        self.detail_encoder.set_submodule(self._last, DetailDown(width, 2 * detail_channels, scale))
        width = self.decoder.get_submodule(self._first).out_channels
        self.decoder.set_submodule(self._first, DetailUp(self.layout.channels, width, scale))
        if family.shortcut is not None:  # the new layers have their own
            for module, name in zip((self.detail_encoder, self.decoder), family.shortcut, strict=True):
                setattr(module, name, False)

        # Order of channels is the layout's: base first. Not saved with the weights: the config holds them.
        self.register_buffer("mean", torch.zeros(1, self.layout.channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, self.layout.channels, 1, 1), persistent=False)
        self._fill_statistics()

        self.base_encoder.requires_grad_(False)
        self.base_quant_conv.requires_grad_(False)
        self.use_slicing = False
        self.use_tiling = False
        self.tiling = Tiling(tile=self.config["sample_size"], overlap=0.25)
        self.train(False)

    def _fill_statistics(self) -> None:
        """Put the config's per-channel statistics into the buffers, at their precision."""
        for buffer, group, default in ((self.mean, "mean", 0.0), (self.std, "std", 1.0)):
            for part, name in zip(self.layout.split(cast(Tensor, buffer)), ("base", "detail"), strict=True):
                values = self.config[f"{name}_{group}"]
                if values is None:
                    values = [default] * part.shape[1]
                if len(values) != part.shape[1]:
                    raise ValueError(f"{name}_{group} has {len(values)} values for {part.shape[1]} channels")
                part.copy_(torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1))

    @classmethod
    def from_base(
        cls, base_vae: nn.Module, detail_channels: int, scale: int = 2, downsample: Downsample = "antialias"
    ) -> DetailVAE:
        """Warm-start from a pretrained diffusers autoencoder: base encoder, detail encoder and decoder take its weights.

        The base part is normalised exactly as pipelines normalise that autoencoder's latents (its scaling and shift, or its
        per-channel mean and std). The decoder starts as the base decoder on z enlarged s times.

        Raises:
            ValueError: unsupported autoencoder, D not a multiple of C, scale not a power of two.
        """
        class_name = type(base_vae).__name__
        family = autoencoder_family(class_name)
        config = cast(Any, base_vae).config
        base_mean, base_std = base_statistics(config)
        model = cls(
            base_class=class_name,
            base_config={key: value for key, value in config.items() if not key.startswith("_")},
            detail_channels=detail_channels,
            scale=scale,
            downsample=downsample,
            base_mean=base_mean,
            base_std=base_std,
        )
        source = cast(Any, base_vae)
        if source.dtype != model.dtype:
            model = model.to(source.dtype)
            model._fill_statistics()
        encoder = source.encoder.state_dict()
        model.base_encoder.load_state_dict(encoder)
        if family.quant and source.quant_conv is not None:
            model.base_quant_conv.load_state_dict(source.quant_conv.state_dict())
        last, first = f"{model._last}.", f"{model._first}."
        load_all_but(model.detail_encoder, {n: v for n, v in encoder.items() if not n.startswith(last)}, last)
        blocks = {n: v for n, v in source.decoder.state_dict().items() if not n.startswith(first)}
        load_all_but(model.decoder, blocks, first)
        up, down = model.decoder.get_submodule(model._first), model.detail_encoder.get_submodule(model._last)
        warm_start_up(cast(DetailUp, up), *first_convolution(source, family), model.layout)
        narrow_posterior(cast(DetailDown, down), model.layout)
        return model.to(source.device)

    # -- statistics --------------------------------------------------------------------------------------------

    def set_detail_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the measured per-channel mean and std (D,) of raw z_d in the config and use them from now on."""
        self.register_to_config(
            detail_mean=[float(value) for value in mean],
            detail_std=[max(float(value), 1e-4) for value in std],  # a dead channel must not divide by zero
        )
        self._fill_statistics()

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw [z, z_d] -> what the transformer sees."""
        return (latents - cast(Tensor, self.mean)) / cast(Tensor, self.std)

    def denormalise(self, latents: Tensor) -> Tensor:
        """What the transformer sees -> raw [z, z_d]."""
        return latents * cast(Tensor, self.std) + cast(Tensor, self.mean)

    # -- encode ------------------------------------------------------------------------------------------------

    def encode_raw(self, images: Tensor) -> RawLatents:
        """One pass of both encoders, before normalisation: what stage 1 trains on (Eq. 1-3 use raw latents).

        Args:
            images: I_hr (B,3,s*H,s*W) in [-1,1]; H and W divisible by the base's factor.

        Raises:
            ValueError: when the size is not divisible.
        """
        height, width = images.shape[-2:]
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"images are {width}x{height}; both sides must be divisible by {self.spatial_factor}")
        if self.use_tiling and max(height, width) > self.tiling.tile:
            moments = self._tiled_moments(images)
        else:
            moments = self._moments(images, self.base_encoder, self.detail_encoder)
        z, mean, logvar = moments.split([self.layout.base_channels, *[self.layout.detail_channels] * 2], dim=1)
        return RawLatents(z, mean, logvar.clamp(-30.0, 20.0))

    def _moments(self, images: Tensor, base_encoder: Encode, detail_encoder: Encode) -> Tensor:
        """(B,3,s*H,s*W) -> z, mean and logvar of z_d stacked, (B,C+2D,h,w)."""
        with torch.no_grad():
            base_images = downsample(images, self.layout.scale, self.config["downsample"])
            z = self.base_quant_conv(base_encoder(base_images))[:, : self.layout.base_channels]  # mode
        return torch.cat([z, detail_encoder(images)], dim=1)

    def _tiled_moments(self, images: Tensor) -> Tensor:
        base, detail, tile = self.base_encoder, self.detail_encoder, self.tiling.tile
        if isinstance(base, Encoder) and isinstance(detail, Encoder) and not torch.is_grad_enabled():
            return self._moments(
                images,
                lambda x: by_rows.encode(base, x, (tile // self.layout.scale) ** 2),
                lambda x: by_rows.encode(detail, x, tile**2),
            )

        def whole(x: Tensor) -> Tensor:
            return self._moments(x, base, detail)

        return tiled(whole, images, tile, self.tiling.overlap, 1 / self.spatial_factor)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[StructuredPosterior]:
        """I_hr (B,3,s*H,s*W) in [-1,1] -> posterior of the normalised z_hr (B,C+D,h,w)."""
        parts = x.split(1) if self.use_slicing and len(x) > 1 else [x]
        posterior = torch.cat([self._posterior(part) for part in parts])
        distribution = StructuredPosterior(posterior, self.layout)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _posterior(self, images: Tensor) -> Tensor:
        raw = self.encode_raw(images)
        mean = self.normalise(self.layout.join(raw.z, raw.mean))
        _, detail_std = self.layout.split(cast(Tensor, self.std))
        logvar = self.layout.join(torch.full_like(raw.z, -30.0), raw.logvar - 2 * detail_std.log())
        return torch.cat([mean, logvar], dim=1)  # (B,2(C+D),h,w)

    # -- decode ------------------------------------------------------------------------------------------------

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Raw [z, z_d] (B,C+D,h,w) -> (B,3,s*H,s*W)."""
        tile = self.tiling.tile // self.spatial_factor
        if self.use_tiling and max(latents.shape[-2:]) > tile:
            if isinstance(self.decoder, Decoder) and not torch.is_grad_enabled():
                return by_rows.decode(self.decoder, latents, self.tiling.tile**2)
            return tiled(self.decoder, latents, tile, self.tiling.overlap, self.spatial_factor)
        return self.decoder(latents)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Normalised z_hr (B,C+D,h,w) -> I_hr (B,3,s*H,s*W) in about [-1,1]. `generator` is diffusers' signature."""
        if z.shape[1] != self.layout.channels:
            raise ValueError(
                f"latents have {z.shape[1]} channels, this autoencoder takes {self.layout.base_channels} base + "
                f"{self.layout.detail_channels} detail = {self.layout.channels}"
            )
        parts = z.split(1) if self.use_slicing and len(z) > 1 else [z]
        sample = torch.cat([self.decode_raw(self.denormalise(part)) for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, as every diffusers autoencoder does."""
        posterior = cast(AutoencoderKLOutput, self.encode(sample)).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    @property
    def last_encoder_weight(self) -> Tensor:
        """Weight of the detail encoder's last convolution: where adaptive alignment compares gradients."""
        return cast(DetailDown, self.detail_encoder.get_submodule(self._last)).conv.weight

    @property
    def last_decoder_weight(self) -> Tensor:
        """Weight of the decoder's last convolution: where the adaptive GAN weight compares gradients."""
        return [module for module in self.decoder.modules() if isinstance(module, nn.Conv2d)][-1].weight

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As every diffusers model; ValueError for a base class without checkpointing, or with one that changes results."""
        if not autoencoder_family(self.config["base_class"]).checkpointing:
            raise ValueError(
                f"diffusers' {self.config['base_class']} has no gradient checkpointing, or computes something else under it; "
                "set stage1.gradient_checkpointing to false"
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode pictures larger than a tile with less memory; sizes in pixels.

        Where no gradient is asked for, KL autoencoders work in strips of as many positions as a tile has, which gives the
        untiled result but for half-precision rounding (`by_rows`). All others run on overlapping tiles with blended seams.
        """
        tile = tile_sample_min_size or self.tiling.tile
        overlap = self.tiling.overlap if tile_overlap_factor is None else tile_overlap_factor
        self.tiling = Tiling(tile - tile % self.spatial_factor, overlap)
        super().enable_tiling()

    def train(self, mode: bool = True) -> DetailVAE:
        """The base encoder stays in eval mode."""
        super().train(mode)
        self.base_encoder.train(False)
        return self


# A pipeline's model_index.json names a component's home; diffusers takes a name only if that module is imported, and
# `import davae` is what people write.
DetailVAE.__module__ = "davae"


def base_statistics(config: Any) -> tuple[list[float], list[float]]:
    """Per-channel mean and std by which pipelines normalise a base autoencoder's latents: (z - mean) / std."""
    channels = int(config["latent_channels"])
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        factor = float(config.get("scaling_factor") or 1.0)
        return list(config["latents_mean"]), [float(std) / factor for std in config["latents_std"]]
    scaling, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    return [shift] * channels, [1 / scaling] * channels
