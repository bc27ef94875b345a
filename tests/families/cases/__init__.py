"""Tiny models and pipelines, one file for each file of `davae/backbones/families`.

CASES: class name -> tiny model. BUILDERS: class name -> function that writes the folder of a tiny pipeline; a name may have
more words after the class, for another pipeline of it. VARIANTS: other pipelines of the same classes.
"""

from __future__ import annotations

from cases import cogview, dit, expand_only, flux, lumina, others, pixart, qwen, stable_diffusion
from cases.case import Builder, Case

FILES = (stable_diffusion, dit, flux, pixart, lumina, cogview, qwen, others, expand_only)
CASES: dict[str, Case] = {name: case for file in FILES for name, case in file.CASES.items()}
BUILDERS: dict[str, Builder] = {n: b for file in FILES for n, b in getattr(file, "BUILDERS", {}).items()}
VARIANTS: dict[str, Builder] = {n: b for file in FILES for n, b in getattr(file, "VARIANTS", {}).items()}
