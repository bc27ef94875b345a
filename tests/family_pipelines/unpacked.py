"""Tiny pipelines of flow-matching transformers that take latents as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

BUILDERS: dict[str, Callable[[Path], None]] = {}
