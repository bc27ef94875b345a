"""One seed, three ways: the base enlarged, the base at the doubled size, the upgrade. Writes three_ways.png.

    python examples/three_ways.py [FOLDER]
"""

import sys
from pathlib import Path

from davae.data.images import grid
from davae.sample.open import (open_model)
from davae.sample.generate import generate

PROMPTS = ["a red rose", "a pizza", "a rocket"]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
base, _ = open_model("micro")
upgraded, _ = open_model("micro-upgraded")

options = {"steps": 30, "guidance_scale": 4.0, "seed": 0}
small = generate(base, PROMPTS, resolution=64, **options)  # 64 tokens
native = generate(base, PROMPTS, resolution=128, **options)  # 256 tokens
large = generate(upgraded, PROMPTS, resolution=128, **options)  # 64 tokens

rows = zip((picture.resize((128, 128)) for picture in small), native, large, strict=True)
sheet = grid([picture for row in rows for picture in row], columns=3)
sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(folder / "three_ways.png")
