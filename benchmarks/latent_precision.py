"""Errors of cached latents by precision of encoding, against float32.

    python benchmarks/latent_precision.py --json docs/results/data/latent_precision.json

For each precision, and for float32 stored as float16: the error's standard deviation over the latents', per group, the
signal-to-noise ratio, and PSNR between what the decoder makes of both.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data.images import ImageDataset
from davae.data.openmoji import CREDIT
from davae.data.sources import open_source
from davae.dataset.encoding import Encoder
from davae.pretrained.autoencoders import load_detail_vae
from davae.zoo import UPGRADES


def compare(exact: Tensor, found: Tensor, vae: Any) -> dict[str, float]:
    """Errors of raw latents, and of what is decoded from them."""
    figures: dict[str, float] = {}
    parts = zip(("base", "detail"), vae.layout.split(exact), vae.layout.split(found), strict=True)
    for name, wanted, own in parts:
        ratio = float((own - wanted).std() / wanted.std())
        figures |= {f"{name}_error": ratio, f"{name}_snr_db": -20 * math.log10(max(ratio, 1e-9))}
    with torch.no_grad():
        error = vae.decode_raw(found).clamp(-1, 1) - vae.decode_raw(exact).clamp(-1, 1)
    figures["decoded_psnr_db"] = -10 * math.log10(max(float(error.square().mean()) / 4, 1e-12))
    return figures


def measure(images: int) -> dict[str, Any]:
    """Return the errors of every way to encode and store."""
    vae = load_detail_vae(UPGRADES["micro"] / "vae").eval()
    source = open_source("openmoji", 128)
    pictures = ImageDataset(source, range(images), 128)
    batch = torch.stack([pictures.read(number, -1)["image"] for number in range(images)])
    exact = Encoder(vae, torch.float32, 8)(batch)
    found = {"stored as float16": compare(exact, exact.half().float(), vae)}
    for name in ("bfloat16", "float16"):
        latents = Encoder(vae, getattr(torch, name), 8)(batch)
        found[f"encoded in {name}, stored as float16"] = compare(exact, latents.half().float(), vae)
    return {"model": "micro-upgraded", "images": images, "data": CREDIT, "against float32": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(measure(given.images), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
