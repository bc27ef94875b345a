"""A tiny pipeline folder of every family that `davae upgrade` trains: class name -> what writes its folder.

One builder a family; `packed`, `unpacked` and `diffusion` hold those of transformers that see 2x2 packed tokens, of the other
flow-matching ones, and of the ones trained by DDPM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from family_pipelines import diffusion, packed, unpacked

Builder = Callable[[Path], None]
BUILDERS: dict[str, Builder] = {**packed.BUILDERS, **unpacked.BUILDERS, **diffusion.BUILDERS}
VARIANTS: dict[str, Builder] = diffusion.VARIANTS  # other pipelines of the same classes
