"""Locks of a run folder: of its one training, and of others that read its cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from davae.errors import RunError
from davae.files.atomic import alive, atomic_text, machine_id, make_folder, saving
from davae.files.reading import load_json, whole_number
from davae.train.distributed import ranks

logger = logging.getLogger(__name__)

LOCK, PROCESS = ".lock", ".process.json"
CHANGING, READERS, ORIGIN = ".changing.lock", ".readers", ".stage1"


def try_lock(path: Path) -> FileLock | None:
    """Return the held lock of a file, None while another process or thread holds it.

    A file system without locks is named in the log, once, and the lock is taken as held.
    """
    lock = FileLock(path, timeout=0, thread_local=False)
    with saving(path):
        try:
            lock.acquire()
        except Timeout:
            return None
        except NotImplementedError:
            logger.warning("%s: this file system has no locks; never start a run twice at the same time", path.parent)
    return lock


class RunLock:
    """Lock of a run folder, held until `release` or the end of the process.

    Raises:
        RunError: another process holds it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        lock = try_lock(folder / LOCK)
        if lock is None:
            pid = running_process(folder)
            who = "" if pid is None else f" (process {pid})"
            raise RunError(f"{folder} is in use by another davae process{who}; wait for it or use another --out")
        self._lock = lock
        atomic_text(folder / PROCESS, json.dumps({"pid": os.getpid(), "host": machine_id()}))

    def release(self) -> None:
        (self.folder / PROCESS).unlink(missing_ok=True)
        self._lock.release()


def running_process(run_folder: Path) -> int | None:
    """Return the id of the process that trains in a run folder on this machine, else None.

    It is found whoever started it, and not taken for another process that was given the id of a killed one.
    """
    try:
        about = load_json((run_folder / PROCESS).read_text(encoding="utf-8"))
        pid, host = whole_number(about["pid"]), about["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if host != machine_id() or not alive(pid):
        return None
    if (lock := try_lock(run_folder / LOCK)) is None:
        return pid
    lock.release()
    return None


# -- the autoencoder and the cache of a run, used by others ------------------------------------------------------------


def _readers(folder: Path) -> list[Path]:
    """Return the lock files of runs that read this folder now, and remove those of killed ones."""
    held = []
    for path in sorted((folder / READERS).glob("*.lock")):
        if (lock := try_lock(path)) is None:
            held.append(path)
        else:
            path.unlink(missing_ok=True)
            lock.release()
    return held


def hold_for_reading(folder: Path) -> FileLock | None:
    """Keep another run's autoencoder and cache from being changed while the lock is held.

    Returns None where the folder cannot be written.

    Raises:
        RunError: they are being changed now.
    """
    place = folder / READERS
    if not os.access(folder, os.W_OK):
        return None
    make_folder(place)
    own = try_lock(place / f"{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}.lock")
    changing = try_lock(folder / CHANGING)
    if changing is None:
        if own is not None:
            own.release()
        raise RunError(f"--stage1 {folder}: its stage 1 or cache is being made now; wait until its stage 2 begins")
    changing.release()
    return own


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep others from using the autoencoder and cache of a folder while they are made.

    Raises:
        RunError: another run reads them now.
    """
    lock = try_lock(folder / CHANGING)
    try:
        if readers := _readers(folder):
            used = f"{len(readers)} other run(s) use its autoencoder and cache (--stage1)"
            raise RunError(f"{folder}: {used}; wait for them, or use another --out")
        yield
    finally:
        if lock is not None:
            lock.release()


def keep_origin(run: Path, origin: Path) -> None:
    """Note the other run that serves a run (`--stage1`), unless stage 2 began with another."""
    begun = any(run.glob("checkpoints/stage2[-.][0-9d]*"))  # a checkpoint, or the mark of its end
    known = kept_origin(run) if begun else None
    if (known is None or not known.is_dir()) and os.path.realpath(run) != os.path.realpath(origin):
        atomic_text(run / ORIGIN, os.path.abspath(origin))


def kept_origin(run: Path) -> Path | None:
    """Return the run that `keep_origin` noted, None without one or before anything began."""
    noted = any(run.glob("checkpoints/*")) and (run / ORIGIN).is_file()
    origin = Path((run / ORIGIN).read_text("utf-8")) if noted else run
    return None if os.path.realpath(origin) == os.path.realpath(run) else origin


def base_home(run: Path, seen: tuple[Path, ...] = ()) -> Path:
    """Return the folder of the run that trained the base of a run, by `--stage1` another."""
    origin = None if (run / "base").is_dir() or run in seen else kept_origin(run)
    return run if origin is None or not origin.is_dir() else base_home(origin, (*seen, run))


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
