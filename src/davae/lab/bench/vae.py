"""`davae bench vae`: time and peak memory of encoding and decoding, whole and tiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from davae.lab.bench.clock import added_memory, gpu_rounds, machine, race, ratio
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.placement import own_device
from davae.vae.base import image_side
from davae.vae.detail_vae import DetailVAE
from davae.vae.frames import decode_latents, encode_mode

Way = Literal["encode", "decode"]
WAYS: tuple[Way, ...] = get_args(Way)


def synthetic_picture(resolution: int) -> Tensor:
    """(1,3,R,R) in [-1,1]: gradients, waves of many lengths and some noise, the same each time."""
    along = torch.linspace(0, 1, resolution)
    y, x = torch.meshgrid(along, along, indexing="ij")
    waves = [torch.sin(2 * math.pi * (k * x + (5 - k) * y * k + k / 3)) / k for k in (1, 2, 3, 7, 23, 61)]
    picture = torch.stack([sum(waves[i::3], torch.zeros_like(x)) + (x, y, 1 - x)[i] - 0.5 for i in range(3)])
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    return (0.6 * picture + 0.05 * noise).clamp(-1, 1)[None]


def _opened(model: str, tile: int | None, dtype: torch.dtype) -> Any:
    """Return the autoencoder on this process's device, tiled where a tile's side is given."""
    vae = load_autoencoder(model).to(own_device(), dtype)
    if tile is not None:
        vae.enable_tiling(tile)
    return vae


def encoding_work(model: str, picture: Tensor, tile: int | None, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return work for `added_memory` that encodes one image.

    No image is encoded before it, as freed memory would not count again.
    """
    vae = _opened(model, tile, dtype)
    given = picture.to(vae.device, dtype)
    return torch.no_grad()(lambda: encode_mode(vae, given).cpu())


def decoding_work(model: str, latents: Tensor, tile: int | None, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Work for `added_memory`: one picture's latents decoded."""
    vae = _opened(model, tile, dtype)
    given = latents.to(vae.device, dtype)
    return torch.no_grad()(lambda: decode_latents(vae, given).cpu())


def psnr_in_range(a: Tensor, b: Tensor, span: float) -> float:
    """Return 10 log10(span^2 / MSE) in dB, infinite for equal tensors."""
    error = float((a - b).square().mean())
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def bench_vae(
    model: str,
    *,
    resolution: int,
    tile: int,
    repeats: int,
    ways: Sequence[Way] = WAYS,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Whole against tiled.

    Raises:
        ValueError: a size that the autoencoder cannot encode, or another than a DetailVAE, whose tiles alone vary.
    """
    vae = load_autoencoder(model)
    picture = synthetic_picture(image_side(vae, resolution))
    if not isinstance(vae, DetailVAE):
        raise ValueError(
            f"{model} holds an {type(vae).__name__}; `davae bench vae` times the tiles of a DetailVAE: give the folder of an "
            "upgrade's run, or micro-upgraded"
        )
    latents = encoding_work(model, picture, min(256, resolution), dtype)().float()
    figures: dict[str, Any] = {"vae": model, "resolution": resolution, "tile": tile}
    for way in ways:
        prepare, given = (encoding_work, picture) if way == "encode" else (decoding_work, latents)
        figures[way] = whole_against_tiled(prepare, given, model, tile, repeats, dtype)
    return {**figures, "dtype": str(dtype).removeprefix("torch."), "machine": machine()}


def whole_against_tiled(
    prepare: Callable[[str, Tensor, int | None, torch.dtype], Callable[[], Tensor]],
    given: Tensor,
    model: str,
    tile: int,
    repeats: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return time, peak memory and difference of encoding or of decoding.

    The PSNR of a decoded image uses the range of images, that of latents their own range.
    """
    made: dict[str, Tensor] = {}

    def kept(name: str, work: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: made.update({name: work()})

    sides = {"whole": None, "tiled": tile}
    works = {name: kept(name, prepare(model, given, side, dtype)) for name, side in sides.items()}
    times = race(works, repeats, warmup=gpu_rounds())
    memory = {name: added_memory(prepare, model, given, side, dtype) for name, side in sides.items()}
    whole, tiled = made["whole"].float(), made["tiled"].float()
    if prepare is decoding_work:
        error = psnr_in_range(tiled.clamp(-1, 1), whole.clamp(-1, 1), 2.0)
    else:
        error = psnr_in_range(tiled, whole, float(whole.max() - whole.min()))
    return {
        "whole_seconds": times["whole"].as_dict(),
        "tiled_seconds": times["tiled"].as_dict(),
        "time_ratio": ratio(times["tiled"], times["whole"]),
        "whole_peak_mib": memory["whole"] / 2**20,
        "tiled_peak_mib": memory["tiled"] / 2**20,
        "memory_ratio": memory["tiled"] / memory["whole"],
        "psnr": error,
    }
