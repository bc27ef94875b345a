"""DetailVAE: a frozen base encoder, a new detail encoder and one decoder (Sec. 3.1)."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.latent import LatentLayout, over_grid
from davae.vae.base import (
    autoencoder_class,
    autoencoder_family,
    base_channels,
    base_statistics,
    packed_statistics,
    spatial_factor,
)
from davae.vae.base_decoder import BaseDecoder
from davae.vae.base_part import BasePart
from davae.vae.blocks import DetailDown, Downsample, downsample, replace_ends
from davae.vae.frames import frames_of, only_frame
from davae.vae.normalisation import Normalisation
from davae.vae.pipeline_contract import pipeline_entries
from davae.vae.posterior import RawLatents, StructuredPosterior
from davae.vae.strips import decode_by_rows, encode_by_rows
from davae.vae.tiling import Tiling, tiled
from davae.vae.warm_start import Start, load_base_weights
from davae.vae.whole_layers import decode_in_tiles, encode_in_tiles

Encode = Callable[[Tensor], Tensor]


class DetailVAE(ModelMixin, AutoencoderMixin, ConfigMixin, BasePart, Normalisation):
    """A detail-aligned VAE whose latents are normalised (`scaling_factor` 1, `shift_factor` 0).

    Make one from a pretrained autoencoder with `from_base`. The arguments are stored in its config.

    Args:
        base_class, base_config: diffusers class of the base autoencoder and its config.
        detail_channels: D, a multiple of the base's C.
        scale: s, ratio of the high resolution to the base resolution; a power of two.
        downsample: how I is made from I_hr.
        base_mean, base_std: per channel, or per channel and position of a 2x2 cell, (c,2,2); z is normalised as the
            pretrained transformer expects it.
        detail_mean, detail_std: per channel, measured over the training set.
        detail_kernel_size: k, where z_d is what z does not predict (`set_detail_kernel`).
        resolution: pixels of the images it was made for, which its pipeline draws by default.
        learned_shortcuts: the new blocks' shortcuts have weights of their own even where channels divide.
        base_decoder_config: arguments of the optional BaseDecoder, which `attach_base_decoder` fills in.

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
        detail_kernel_size: int | None = None,
        learned_shortcuts: bool = False,
        resolution: int | None = None,
        block_out_channels: list[int] | None = None,
        encoder_block_out_channels: list[int] | None = None,
        latent_channels: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        z_dim: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        temperal_downsample: list[bool] | None = None,
        batch_norm_eps: float | None = None,
        base_decoder_config: dict[str, Any] | None = None,
    ):
        super().__init__()
        family = autoencoder_family(base_class)
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, at least 2, found {scale}")
        base = autoencoder_class(base_class).from_config(base_config)
        self.layout = LatentLayout(base_channels(base.config, base_class), detail_channels, scale)
        self.frames = frames_of(base_class, base.config)
        widths = list(base.config[family.widths])
        longer = [*widths, *widths[-1:] * int(math.log2(scale))]  # by its length pipelines know the factor
        self.spatial_factor = spatial_factor(base.config, base_class) * scale  # pixels per latent position, each way
        self.register_to_config(
            block_out_channels=longer,
            encoder_block_out_channels=list(longer),
            latent_channels=self.layout.channels,
            sample_size=int(base.config.get("sample_size") or 32 * self.spatial_factor // scale) * scale,
            **pipeline_entries(self, family, base.config, self.layout.channels, self.spatial_factor),
        )
        self.base_encoder = base.encoder
        self.base_quant_conv = base.quant_conv if family.quant and base.quant_conv is not None else nn.Identity()
        self.detail_encoder = copy.deepcopy(base.encoder)
        self.decoder = base.decoder
        self.base_decoder = None if base_decoder_config is None else BaseDecoder(**base_decoder_config)
        ends = replace_ends(self.detail_encoder, self.decoder, family, self.layout, learned_shortcuts)
        self._last, self._first = ends
        self._register_statistics(family.cell)
        self.base_encoder.requires_grad_(False)
        self.base_quant_conv.requires_grad_(False)
        self.use_slicing = self.use_tiling = False
        self.tiling = Tiling(tile=self.config["sample_size"], overlap=0.25)
        self.train(False)

    @classmethod
    def from_base(
        cls,
        base_vae: nn.Module,
        detail_channels: int,
        scale: int = 2,
        downsample: Downsample = "antialias",
        start: Start = "enlarged",
    ) -> DetailVAE:
        """Return a DetailVAE that starts with the weights of a pretrained diffusers autoencoder.

        The base part is normalised exactly as pipelines normalise that autoencoder's latents (its scaling and shift, or its
        per-channel mean and std).

        Args:
            start: `enlarged`: the decoder starts as the base decoder on z enlarged s times, z_d from random filters (as the
                paper's). `unfolded`: z_d starts as the base latent of I_hr at its s x s sub-positions, as much of it as D
                channels hold, aligned with z from the start, and the decoder as the base decoder on that.

        Raises:
            ValueError: unsupported or offloaded autoencoder, D not a multiple of C, scale not a power of two; `unfolded`
                where D is not a multiple of s^2.
        """
        source = cast(Any, getattr(base_vae, "_orig_mod", base_vae))  # of a compiled one
        class_name, config = type(source).__name__, source.config
        family = autoencoder_family(class_name)
        base_mean, base_std = packed_statistics(source) if family.cell > 1 else base_statistics(config)
        model = cls(
            base_class=class_name,
            base_config={key: value for key, value in config.items() if not key.startswith("_")},
            detail_channels=operator.index(detail_channels),
            scale=operator.index(scale),
            downsample=downsample,
            base_mean=base_mean,
            base_std=base_std,
            learned_shortcuts=start == "unfolded",  # what averages would add is not the base's latent
        )
        if source.device.type == "meta" and any(hasattr(part, "_hf_hook") for part in source.modules()):
            raise ValueError(f"this {class_name} is offloaded, its weights on the meta device; call from_base before")
        model = model.to(source.device)
        if source.dtype != model.dtype:
            model = model.to(source.dtype)
            model._fill_statistics()
        load_base_weights(model, source, start)
        return model

    def encode_raw(self, images: Tensor) -> RawLatents:
        """Return raw latents of both encoders, as stage 1 trains on them (Eq. 1-3).

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
            moments = self.frames.encode(lambda x: self.base_quant_conv(base_encoder(x)), base_images)
            z = moments[:, : self.layout.base_channels]  # mode
        return torch.cat([z, self.frames.encode(detail_encoder, images)], dim=1)

    def _tiled_moments(self, images: Tensor) -> Tensor:
        base, detail, tile = self.base_encoder, self.detail_encoder, self.tiling.tile
        if isinstance(base, Encoder) and isinstance(detail, Encoder) and not torch.is_grad_enabled():
            return self._moments(
                images,
                lambda x: encode_by_rows(base, x, (tile // self.layout.scale) ** 2),
                lambda x: encode_by_rows(detail, x, tile**2),
            )

        patch, scale, overlap = self.frames.patch, self.layout.scale, self.tiling.overlap
        factor = self.spatial_factor // patch
        if isinstance(base, Encoder):  # with gradients: its layers that see the whole image see a tile
            return tiled(lambda x: self._moments(x, base, detail), images, tile, overlap, 1 / self.spatial_factor)
        return self._moments(
            images,
            lambda x: encode_in_tiles(base, x, Tiling(tile // scale // patch, overlap), factor // scale),
            lambda x: encode_in_tiles(detail, x, Tiling(tile // patch, overlap), factor),
        )

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[StructuredPosterior]:
        """I_hr (B,3,s*H,s*W) in [-1,1] -> posterior of the normalised z_hr (B,C+D,h,w).

        Pipelines for video autoencoders hand over one frame, (B,3,1,s*H,s*W), and get (B,C+D,1,h,w). The base encoder is
        frozen: z has a zero gradient with respect to the image, z_d has its own.

        Raises:
            ValueError: a size that is not divisible, or several frames.
        """
        framed = x.ndim == 5
        x = only_frame(x) if framed else x
        parts = x.split(1) if self.use_slicing and len(x) > 1 else [x]
        posterior = torch.cat([self._posterior(part) for part in parts])
        distribution = StructuredPosterior(posterior[:, :, None] if framed else posterior, self.layout)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _posterior(self, images: Tensor) -> Tensor:
        raw = self.encode_raw(images)
        mean = self.normalise(self.layout.join(raw.z, raw.mean))
        _, detail_std = self.layout.split(over_grid(cast(Tensor, self.std), mean))
        logvar = self.layout.join(torch.full_like(raw.z, -30.0), raw.logvar - 2 * detail_std.log())
        return torch.cat([mean, logvar], dim=1)  # (B,2(C+D),h,w)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Raw [z, z_d] (B,C+D,h,w) -> (B,3,s*H,s*W)."""
        tile = self.tiling.tile // self.spatial_factor
        if self.use_tiling and max(latents.shape[-2:]) > tile:
            if isinstance(self.decoder, Decoder) and not torch.is_grad_enabled():
                return decode_by_rows(self.decoder, latents, self.tiling.tile**2)
            if isinstance(self.decoder, Decoder):
                return tiled(self.decoder, latents, tile, self.tiling.overlap, self.spatial_factor)
            patch = self.frames.patch
            tiling, factor = Tiling(self.tiling.tile // patch, self.tiling.overlap), self.spatial_factor // patch

            def decode(x: Tensor, **options: bool) -> Tensor:
                return decode_in_tiles(self.decoder, x, tiling, factor, **options)

            return self.frames.decode(decode, latents)
        return self.frames.decode(self.decoder, latents)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return I_hr (B,3,s*H,s*W) in about [-1,1] of normalised z_hr (B,C+D,h,w).

        One frame (B,C+D,1,h,w) gives (B,3,1,s*H,s*W). `generator` is diffusers' signature.

        Raises:
            ValueError: another number of channels, or several frames.
        """
        if z.shape[1] != self.layout.channels:
            raise ValueError(
                f"latents have {z.shape[1]} channels, this autoencoder takes {self.layout.base_channels} base + "
                f"{self.layout.detail_channels} detail = {self.layout.channels}"
            )
        framed = z.ndim == 5
        z = only_frame(z) if framed else z
        parts = z.split(1) if self.use_slicing and len(z) > 1 else [z]
        sample = torch.cat([self.decode_raw(self.denormalise(part)) for part in parts])
        if framed:
            sample = sample[:, :, None]
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
    def memory_format(self) -> torch.memory_format:
        """The layout of weights in which it trains fastest."""
        return torch.contiguous_format if self.frames.video else torch.channels_last

    @property
    def post_quant_conv(self) -> nn.Module:
        """The decoder's first layer, by whose dtype SDXL's pipelines decode latents."""
        return self.decoder.get_submodule(self._first)

    @property
    def last_encoder_weight(self) -> Tensor:
        """Weight of the detail encoder's last convolution, where alignment compares gradients."""
        return cast(DetailDown, self.detail_encoder.get_submodule(self._last)).conv.weight

    @property
    def last_decoder_weight(self) -> Tensor:
        """Weight of the decoder's last convolution, where the GAN weight compares gradients."""
        return [module for module in self.decoder.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))][-1].weight

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, as in every diffusers model.

        Raises:
            ValueError: a base class without checkpointing, or with checkpointing that changes results.
        """
        if not autoencoder_family(self.config["base_class"]).checkpointing:
            raise ValueError(
                f"diffusers' {self.config['base_class']} has no gradient checkpointing, or computes something else under it; "
                "set stage1.gradient_checkpointing to false"
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode images larger than a tile with less memory.

        Where no gradient is asked for, KL autoencoders work in strips of as many positions as a tile has, which gives the
        untiled result but for half-precision rounding (`strips`). All others run their layers that see the whole image on
        the whole latent grid, and the others on overlapping tiles with blended seams (`whole_layers`).
        """
        tile = tile_sample_min_size or self.tiling.tile
        overlap = self.tiling.overlap if tile_overlap_factor is None else tile_overlap_factor
        self.tiling = Tiling(tile - tile % self.spatial_factor, overlap)
        super().enable_tiling()

    def train(self, mode: bool = True) -> DetailVAE:
        """Set train or eval mode, but keep the base encoder in eval mode."""
        super().train(mode)
        self.base_encoder.train(False)
        return self


# A pipeline's model_index.json names a component's home; diffusers takes a name only if that module is imported, and
# `import davae` is what people write.
DetailVAE.__module__ = "davae"
