"""The tiny autoencoder of FLUX.2's latents (TAEF2), with pooled blocks around the latent."""

from __future__ import annotations

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from davae.vae.tiling import Tiling
from davae.vae.whole_layers import decode_in_tiles, encode_in_tiles


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds features pooled over all positions, by a group norm."""

    def __init__(self, channels: int, act_fn: str):
        super().__init__(channels, channels, act_fn)
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


class PooledAutoencoderTiny(AutoencoderTiny):
    """AutoencoderTiny whose `pooled_blocks` blocks nearest to the latent are pooled.

    The other arguments are AutoencoderTiny's.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        latent_channels: int = 32,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        pooled_blocks: int = 3,
        upsampling_scaling_factor: int = 2,
        upsample_fn: str = "nearest",
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] | None = None,  # written by AutoencoderTiny itself
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
            act_fn=act_fn,
            latent_channels=latent_channels,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            upsampling_scaling_factor=upsampling_scaling_factor,
            upsample_fn=upsample_fn,
            latent_magnitude=latent_magnitude,
            latent_shift=latent_shift,
            force_upcast=force_upcast,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        for layers, first, width in (
            (self.encoder.layers, len(self.encoder.layers) - 1 - pooled_blocks, encoder_block_out_channels[-1]),
            (self.decoder.layers, 2, decoder_block_out_channels[0]),  # after the first convolution and its ReLU
        ):
            for number in range(first, first + pooled_blocks):
                layers[number] = PooledBlock(width, act_fn)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        """Encode in tiles, with the pooled blocks on the whole grid."""
        factor = self.spatial_scale_factor
        tiling = Tiling(self.tile_latent_min_size * factor, min(0.5, self.tile_overlap_factor))
        return encode_in_tiles(self.encoder, x, tiling, factor)

    def _tiled_decode(self, x: Tensor) -> Tensor:
        """Decode in tiles, the pooled blocks on the whole grid."""
        factor = self.spatial_scale_factor
        tiling = Tiling(self.tile_latent_min_size * factor, min(0.5, self.tile_overlap_factor))
        return decode_in_tiles(self.decoder, x, tiling, factor)


PooledAutoencoderTiny.__module__ = "davae"  # as DetailVAE's: the name that diffusers writes into model_index.json
