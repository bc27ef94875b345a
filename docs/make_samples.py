"""Draws docs/samples.png: base enlarged, base native, shipped upgrade, for the same prompts and base noise.

Run: .venv/bin/python docs/make_samples.py [SEED]
"""

import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from davae.data.images import grid
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, open_model

PROMPTS = [
    "a red rose",
    "a pizza",
    "a green apple",
    "a cat face on a blue background",
    "a sunflower on a pink background",
    "a red heart",
    "a rocket",
    "a fox on a yellow background",
]
SEED = int(sys.argv[1]) if len(sys.argv) > 1 else 0
OPTIONS = SamplingOptions(steps=30, guidance=4.0, seed=SEED)

base, _ = open_model("micro")
upgraded, _ = open_model("micro-upgraded")
small = generate(base, PROMPTS, OPTIONS)
rows = [
    [picture.resize((128, 128), Image.Resampling.BILINEAR) for picture in small],
    generate(base, PROMPTS, replace(OPTIONS, resolution=128)),
    generate(upgraded, PROMPTS, OPTIONS),
]
grid([picture for row in rows for picture in row], len(PROMPTS)).save(Path(__file__).parent / "samples.png")
