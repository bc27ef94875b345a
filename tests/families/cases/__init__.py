"""Tiny models and pipelines, one file for each file of `davae/backbones/families`.

CASES: class name -> tiny model. BUILDERS: class name -> function that writes the folder of a tiny pipeline; a name may have
more words after the class, for another pipeline of it. VARIANTS: other pipelines of the same classes.
"""

from __future__ import annotations

import importlib
import pkgutil

from cases.case import Builder, Case

_modules = [importlib.import_module(f"cases.{found.name}") for found in pkgutil.iter_modules(__path__)]
FILES = [module for module in _modules if hasattr(module, "CASES")]  # a new file is found by itself
CASES: dict[str, Case] = {name: case for file in FILES for name, case in file.CASES.items()}
BUILDERS: dict[str, Builder] = {n: b for file in FILES for n, b in getattr(file, "BUILDERS", {}).items()}
VARIANTS: dict[str, Builder] = {n: b for file in FILES for n, b in getattr(file, "VARIANTS", {}).items()}
