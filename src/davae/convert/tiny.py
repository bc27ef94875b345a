"""The tiny autoencoders' own weight files (TAESD, TAEF1, TAEF2): an encoder and a decoder, numbered layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny
from torch import Tensor

from davae.convert.checkpoints import load_state, load_strictly
from davae.errors import ModelError
from davae.files.atomic import model_folder
from davae.files.ownership import check_out
from davae.vae.pooled_tiny import PooledAutoencoderTiny


def tiny_autoencoder(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> AutoencoderTiny:
    """`taesd_encoder` and `taesd_decoder` weights -> AutoencoderTiny, or PooledAutoencoderTiny where blocks are pooled.

    Args:
        encoder, decoder: `N.weight`, `N.conv.M.weight`, `N.pool.M.weight`; the decoder's layer 0 is a clamp without weights.

    Raises:
        ModelError: keys or shapes that do not fit, named.
    """
    odd = next((name for name in (*encoder, *decoder) if not name.partition(".")[0].isdecimal()), None)
    last = max((int(name.partition(".")[0]) for name in encoder), default=0) if odd is None else 0
    if odd is not None or f"{last}.weight" not in encoder or max(map(len, (*encoder, *decoder))) > 200:
        raise ModelError(
            f"'{str(odd or f'{last}.weight')[:80]}' does not fit a tiny autoencoder; its layers are numbered"
        )
    channels = len(encoder[f"{last}.weight"])
    pooled = len({name.partition(".")[0] for name in encoder if ".pool." in name})
    options: dict[str, Any] = {"latent_channels": channels}
    model = PooledAutoencoderTiny(pooled_blocks=pooled, **options) if pooled else AutoencoderTiny(**options)
    weights = {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():
        number, _, rest = name.partition(".")
        weights[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor  # AutoencoderTiny clamps outside of its layers
    load_strictly(model, weights, "the tiny autoencoder's weights")
    return model.eval()


def convert_tiny(encoder: Path, decoder: Path, out: Path) -> Path:
    """`davae convert tiny`: TAESD's, TAEF1's or TAEF2's two files as one diffusers autoencoder."""
    check_out(out, (encoder, decoder))
    model = tiny_autoencoder(load_state(encoder), load_state(decoder))
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out
