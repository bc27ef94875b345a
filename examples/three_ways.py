"""Draw one seed three ways: the base enlarged, the base at the doubled size, the upgrade. Writes three_ways.png.

`python examples/three_ways.py [FOLDER]`
"""

import sys
from dataclasses import replace
from pathlib import Path

from davae.data.images import grid
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, open_model

PROMPTS = ["a red rose", "a pizza", "a rocket"]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
base, _ = open_model("micro")
upgraded, _ = open_model("micro-upgraded")

options = SamplingOptions(steps=30, guidance=4.0, seed=0)
small = generate(base, PROMPTS, replace(options, resolution=64))  # 64 tokens
native = generate(base, PROMPTS, replace(options, resolution=128))  # 256 tokens
large = generate(upgraded, PROMPTS, replace(options, resolution=128))  # 64 tokens

rows = zip((image.resize((128, 128)) for image in small), native, large, strict=True)
sheet = grid([image for row in rows for image in row], columns=3)
sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(folder / "three_ways.png")
