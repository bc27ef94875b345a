"""Decode one image with 0, 1/3, 2/3 and all of its detail channels. Writes fade_detail.png.

`python examples/fade_detail.py [FOLDER]`
"""

import sys
from pathlib import Path

import torch

from davae.analyze.sensitivity import decode_faded, reconstructions
from davae.data.images import ImageDataset, grid, split, to_images
from davae.data.openmoji import OpenMoji
from davae.sample.open import open_model

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
base, _ = open_model("micro")
vae = open_model("micro-upgraded")[0].vae

source = OpenMoji(128)
held_out = ImageDataset(source, split(source, 0.1).held_out[:3], 128)  # no training saw these
images = torch.stack([held_out[(i, -1)]["image"] for i in range(3)])  # (3,3,128,128) in [-1,1]
with torch.no_grad():
    latents = vae.encode(images).latent_dist.mode()  # (3,C+D,16,16), base first

columns = [images, reconstructions(vae, base.vae)["base + bicubic"](images)]
for weight in (0.0, 1 / 3, 2 / 3, 1.0):
    columns.append(decode_faded(vae, latents, torch.full((vae.layout.detail_channels,), weight)))
shown = [to_images(column) for column in columns]
sheet = grid([column[row] for row in range(3) for column in shown], columns=len(columns))
sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(folder / "fade_detail.png")
