"""Weights on their way to the device: one copy in a machine's main memory, however many processes it runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from davae.train.distributed import ranks


@contextmanager
def one_at_a_time(run: Path) -> Iterator[None]:
    """Let the processes of one machine that train `run` load their weights one after another.

    The lock lies in the machine's own temporary folder, so that each machine has one. A single process takes none.
    """
    if ranks() == 1:
        yield
        return
    name = hashlib.sha256(str(Path(os.path.realpath(run))).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"davae-load-{name}.lock"):
        yield
