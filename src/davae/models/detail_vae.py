"""DetailVAE: a frozen base encoder, a new detail encoder and one decoder, as a diffusers autoencoder (Sec. 3.1)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.models.families import check_autoencoder, model_class
from davae.models.resample import DetailDown, DetailUp
from davae.models.tiling import Tiling, tiled

Downsample = Literal["antialias", "bicubic"]


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
        latent_channels: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        check_autoencoder(base_class)
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, at least 2, found {scale}")
        base = model_class(base_class).from_config(base_config)
        base_channels = int(base.config["latent_channels"])
        self.layout = LatentLayout(base_channels, detail_channels, scale)
        widths = list(base.config["block_out_channels"])
        extra = int(math.log2(scale))
        self.register_to_config(
            block_out_channels=[*widths, *widths[-1:] * extra],  # its length gives pipelines the spatial factor
            latent_channels=self.layout.channels,
            sample_size=int(base.config["sample_size"]) * scale,
        )
        self.spatial_factor = 2 ** (len(widths) - 1) * scale  # pixels per latent position, each way

        self.base_encoder = base.encoder
        self.base_quant_conv = base.quant_conv if base.quant_conv is not None else nn.Identity()
        self.detail_encoder = copy.deepcopy(base.encoder)
        width = self.detail_encoder.conv_out.in_channels
        self.detail_encoder.conv_out = DetailDown(width, 2 * detail_channels, scale)
        self.decoder = base.decoder
        self.decoder.conv_in = DetailUp(self.layout.channels, self.decoder.conv_in.out_channels, scale)

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
        check_autoencoder(class_name)
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
        if source.quant_conv is not None:
            model.base_quant_conv.load_state_dict(source.quant_conv.state_dict())
        trunk = {name: value for name, value in encoder.items() if not name.startswith("conv_out.")}
        _load_all_but(model.detail_encoder, trunk, "conv_out.")
        blocks = {n: v for n, v in source.decoder.state_dict().items() if not n.startswith("conv_in.")}
        _load_all_but(model.decoder, blocks, "conv_in.")
        warm_start_up(model.decoder.conv_in, source.decoder.conv_in, source.post_quant_conv, model.layout)
        narrow_posterior(model.detail_encoder.conv_out, model.layout)
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
            moments = tiled(self._moments, images, self.tiling.tile, self.tiling.overlap, 1 / self.spatial_factor)
        else:
            moments = self._moments(images)
        z, mean, logvar = moments.split([self.layout.base_channels, *[self.layout.detail_channels] * 2], dim=1)
        return RawLatents(z, mean, logvar.clamp(-30.0, 20.0))

    def _moments(self, images: Tensor) -> Tensor:
        """(B,3,s*H,s*W) -> z, mean and logvar of z_d stacked, (B,C+2D,h,w)."""
        with torch.no_grad():
            base_images = downsample(images, self.layout.scale, self.config["downsample"])
            z = self.base_quant_conv(self.base_encoder(base_images))[:, : self.layout.base_channels]  # mode
        return torch.cat([z, self.detail_encoder(images)], dim=1)

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

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode pictures larger than a tile piece by piece with blended seams; sizes in pixels."""
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


def warm_start_up(up: DetailUp, conv_in: nn.Conv2d, post_quant: nn.Conv2d | None, layout: LatentLayout) -> None:
    """Make DetailUp([z, 0]) equal conv_in of z enlarged s times (nearest), away from the border's zero padding.

    A 3x3 convolution on the enlarged grid reads, at sub-position a, the coarse neighbours floor((a+k-1)/s): its taps
    collapse onto a coarse 3x3 kernel. The shortcut's share is subtracted. Detail columns keep their random start.
    """
    scale, width = layout.scale, conv_in.out_channels
    weight, bias = conv_in.weight.detach(), conv_in.bias.detach()  # type: ignore[union-attr]
    if post_quant is not None:  # a 1x1 convolution before conv_in: fold it in
        mix = post_quant.weight.detach()[:, :, 0, 0]
        if post_quant.bias is not None:
            bias = bias + torch.einsum("oikl,i->o", weight, post_quant.bias.detach())
        weight = torch.einsum("oikl,ij->ojkl", weight, mix)
    with torch.no_grad():
        kernel = up.conv.weight.unflatten(0, (width, scale, scale))  # view (c,s,s,C+D,3,3)
        z, _ = layout.split(kernel.flatten(0, 2))  # view (c*s*s,C,3,3); the detail columns stay
        z = z.unflatten(0, (width, scale, scale))
        z.zero_()
        for a in range(scale):
            for b in range(scale):
                for k in range(3):
                    for m in range(3):
                        row, column = (a + k - 1) // scale + 1, (b + m - 1) // scale + 1
                        z[:, a, b, :, row, column] += weight[:, :, k, m]
        if up.shortcut is None:
            repeats = up.conv.out_channels // layout.channels
            for out in range(up.conv.out_channels):
                source = out // repeats
                if source < layout.base_channels:
                    up.conv.weight[out, source, 1, 1] -= 1.0
        assert up.conv.bias is not None
        up.conv.bias.copy_(bias.repeat_interleave(scale**2))


def narrow_posterior(down: DetailDown, layout: LatentLayout, logvar: float = -4.0) -> None:
    """Start z_d's posterior near sigma = exp(logvar/2) = 0.14: unit noise would drown the new latent at first."""
    first = -(-layout.detail_channels // layout.scale**2)  # first convolution channel that feeds log-variances only
    assert down.conv.bias is not None
    with torch.no_grad():
        down.conv.bias[first:] = logvar


def _load_all_but(module: nn.Module, state: dict[str, Tensor], new: str) -> None:
    """Load `state`, which must hold everything except the new parts named by the prefix."""
    result = module.load_state_dict(state, strict=False)
    odd = [name for name in result.missing_keys if not name.startswith(new)] + result.unexpected_keys
    assert not odd, f"weights do not fit: {odd}"
