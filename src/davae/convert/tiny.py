"""Weight files of the tiny autoencoders (TAESD, TAEF1, TAEF2), whose layers are numbered."""

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
    """Convert an encoder's and a decoder's weights into an AutoencoderTiny.

    Where blocks are pooled it is a PooledAutoencoderTiny.

    Args:
        encoder, decoder: `N.weight`, `N.conv.M.weight`, `N.pool.M.weight`; the decoder's layer 0 is a clamp without weights.

    Raises:
        ModelError: keys or shapes that do not fit, named.
    """
    unexpected = next((name for name in (*encoder, *decoder) if not name.partition(".")[0].isdecimal()), None)
    last = max((int(name.partition(".")[0]) for name in encoder), default=0) if unexpected is None else 0
    if unexpected is not None or f"{last}.weight" not in encoder or max(map(len, (*encoder, *decoder))) > 200:
        raise ModelError(
            f"'{str(unexpected or f'{last}.weight')[:80]}' does not fit a tiny autoencoder; its layers are numbered"
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
    """Write one diffusers autoencoder of the two files of TAESD, TAEF1 or TAEF2.

    Args:
        encoder, decoder: the files.
        out: folder to write.
    """
    check_out(out, (encoder, decoder))
    model = tiny_autoencoder(load_state(encoder), load_state(decoder))
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out
