"""One training at a time below a root, by a locked file that the training keeps open."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from davae.errors import RunError
from davae.files.reading import load_json, whole_number

FILE = ".training"


@dataclass(frozen=True)
class Holder:
    """The training that holds the slot.

    Attributes:
        pid: its process, 0 for a moment while it is started.
    """

    name: str
    pid: int


@contextmanager
def taken(root: Path, name: str) -> Iterator[IO[str]]:
    """Take the slot for a training and give the open file, which the training inherits.

    The lock ends with the last process that has the file open, so that a killed page does not give it up.

    Args:
        root: folder of trainings.
        name: of the training.

    Raises:
        RunError: another training holds it.
    """
    stream = os.fdopen(os.open(root / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")
    try:
        _lock(stream)
        write(stream, name, 0)
        yield stream
    finally:
        stream.close()


def _lock(stream: IO[str]) -> None:
    for _ in range(20):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # a training, or for a moment `holder`
            time.sleep(0.02)
    raise RunError("another training runs; pause it first, or wait: one runs at a time")


def write(stream: IO[str], name: str, pid: int) -> None:
    """Write the name and process of the training that holds the slot into its open file."""
    stream.seek(0)
    stream.truncate()
    stream.write(json.dumps({"name": name, "pid": pid}))
    stream.flush()


def holder(root: Path) -> Holder | None:
    """Return the training that holds the slot, None while nobody does."""
    try:
        stream = os.fdopen(os.open(root / FILE, os.O_RDONLY | os.O_NOFOLLOW), "r")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        try:
            written = load_json(stream.read(4096))
            return Holder(str(written["name"]), whole_number(written["pid"]))
        except (ValueError, KeyError, TypeError):  # between two writes
            return Holder("", 0)


def asks_to_stop(pid: int, folder: Path) -> bool:
    """Send SIGTERM to the training of a folder, and return whether the process is that training."""
    try:
        command = Path(f"/proc/{pid}/cmdline")
        if Path("/proc/self").is_dir():
            words = command.read_bytes()
            if b"davae" not in words or os.fsencode(folder.name) not in words:  # the number was given to another
                return False
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return True
