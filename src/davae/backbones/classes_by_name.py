"""Model and pipeline classes by the names that configs give them."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers

from davae.homes import HOMES


def model_class(name: str) -> Any:
    """Return a model or pipeline class by name: diffusers' own, or one of davae's.

    Raises:
        ValueError: neither library has a class of that name.
    """
    found = None
    if name.isidentifier() and hasattr(diffusers, name):
        found = getattr(diffusers, name)
    elif name in HOMES:
        found = getattr(importlib.import_module(HOMES[name]), name)
    if not isinstance(found, type):
        raise ValueError(f"neither diffusers nor davae has a class {name[:80]}")
    return found
