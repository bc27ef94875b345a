"""Local copies of shards, each made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from davae.files.atomic import atomic_file


def cache_folder() -> Path:
    """Return $DAVAE_CACHE, else ~/.cache/davae."""
    return Path(os.environ.get("DAVAE_CACHE") or Path.home() / ".cache" / "davae")


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file unless it is there; processes of one machine wait for each other.

    Args:
        target: the file.
        make: writes and checks it under another name.
    """
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():
                with atomic_file(target) as partial:
                    make(partial)
    return target
