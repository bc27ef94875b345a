"""Measure how near to real photos each row of Table S2 can come at best.

    .venv/bin/python benchmarks/ceilings.py --run RUN --network benchmarks/weights/clothing-sr.safetensors --json FILE

takes held-out photos of clothes in place of samples: as they are, through the base autoencoder at 64 px and enlarged to
128, and through the DetailVAE of a run at 128 px. All are compared with the training photos, as `davae evaluate generation`
compares samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from davae.data.images import to_images, to_tensor
from davae.dataset.look import as_data, batches, real_pictures
from davae.evaluate.detail import PATCH_SIZE, compare_sets, measure_images
from davae.evaluate.features import make_extractor
from davae.evaluate.real_set import real_images
from davae.evaluate.upscale import make_upscaler
from davae.sample.open import open_autoencoder, open_detail_vae
from davae.vae.blocks import downsample
from davae.vae.overflow import decode_in_range, encode_in_range

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIDE, HELD_OUT, AT_A_TIME = 128, 0.1, 16


@torch.no_grad()
def decoded(vae: object, images: Tensor) -> Tensor:
    """Return reconstructions (N,3,H,W) of images in [-1,1]."""
    parts = [decode_in_range(vae, encode_in_range(vae, part)) for part in images.split(AT_A_TIME)]
    return torch.cat(parts).clamp(-1, 1)


def enlarged(images: Tensor, method: str) -> Tensor:
    """Return images (N,3,h,w) at 128 px."""
    return torch.stack([to_tensor(image) for image in make_upscaler(method, SIDE)(to_images(images))])


def main() -> None:
    """Measure every set, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True, help="an upgrade of the base `clothing`")
    parser.add_argument("--network", required=True, help="a super-resolution network")
    parser.add_argument("--data", default=f"{SHARED}/data/clothing128.tar")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--keep", type=Path, default=None, help="folder of the training photos' measurements")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    extractor = make_extractor("lite0", None)
    train, held = (real_pictures(given.data, SIDE, HELD_OUT, side) for side in ("train", "held_out"))
    kept = None if given.keep is None else given.keep / "real"
    real = real_images(train, as_data(given.data), HELD_OUT, "lite0", None, PATCH_SIZE, kept)
    photos = torch.cat(list(batches(held, given.num)))
    base = open_autoencoder("clothing")
    small = decoded(base, downsample(photos, 2))
    sets = {
        "photos": photos,
        "base autoencoder at 64 px, Lanczos": enlarged(small, "lanczos"),
        "base autoencoder at 64 px, network": enlarged(small, given.network),
        "DetailVAE at 128 px": decoded(open_detail_vae(given.run), photos),
        "base autoencoder at 128 px, four times the positions": decoded(base, photos),
    }
    figures = {
        name: compare_sets(
            measure_images(images.split(AT_A_TIME), extractor, PATCH_SIZE), real, extractor.name, PATCH_SIZE
        )
        for name, images in sets.items()
    }
    named = {"run": given.run, "network": given.network, "data": given.data, "held_out": HELD_OUT}
    given.json.write_text(json.dumps({"num": len(photos), **named, "sets": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
