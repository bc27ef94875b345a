"""Files and folders that appear whole under their name or not at all.

Everything davae writes goes through `atomic_file` or `atomic_folder`. Several processes and threads may write the same
name at once: each writes a partial of its own, and the last one to finish is what remains. A partial is on the disk
before it takes its name, so that a power cut leaves the old content or the new.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from davae.errors import RunError
from davae.files.checksums import tensor_sums, write_sums
from davae.files.ownership import check_replaceable, mark

if TYPE_CHECKING:
    from torch import Tensor

KEPT = "everything written before is whole"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BARRED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
BARRED |= {errno.ENAMETOOLONG, errno.ELOOP}
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV}
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors reports the system's error as text
CUT_SHORT = re.compile(  # numpy and torch name no system error where a disk is full
    r"\d+ requested and \d+ written|problem writing element \d+ to file|inline_container|PytorchStreamWriter"
)
DAY = 86_400.0
SWAPS = 100  # tries to take a name that other processes take at the same time


# -- errors of the disk ------------------------------------------------------------------------------------------------


class saving:
    """Turn a full disk or a place that cannot be written into one clear line.

    Args:
        path: the file or folder being written, named in the message.
        kept: what survives, named in the message.

    Raises:
        RunError: the disk is full, or the place cannot be written.
    """

    def __init__(self, path: Path, kept: str = KEPT):
        self.path, self.kept = path, kept

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # tokenizers reports a full disk as a bare Exception
        if isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception:
            _explain(error, self.path, self.kept)


def _explain(error: Exception, path: Path, kept: str) -> None:
    """Raise a RunError for an error of the disk, and return for any other error."""
    if isinstance(error, RunError):
        return
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        found = RUST_ERROR.search(str(error))
        number = int(found[1]) if found else errno.ENOSPC if CUT_SHORT.search(str(error)) else None
    if number in FULL:
        remedy = "free space and run the same command again"
    elif number in BARRED:
        remedy = "use a place that can be written"
    else:
        return
    raise RunError(f"cannot write {path}: {os.strerror(number)}; {kept}, {remedy}") from error


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder lies on, or will lie on."""
    place = Path(os.path.realpath(folder))
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(folder: Path, size: int, purpose: str) -> None:
    """Check that a disk has room before something large is begun.

    Args:
        folder: where it will be written; need not exist.
        size: bytes it will take.
        purpose: what needs the room, named in the message.

    Raises:
        RunError: the disk has less room than `size`.
    """
    free = free_space(folder)
    if free < size:
        raise RunError(
            f"{folder}: {purpose} needs {size / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB left; "
            f"{KEPT}, free space and run the same command again"
        )


# -- names -------------------------------------------------------------------------------------------------------------

MADE_HERE = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|replaced)(\.\w+)?"
)


@functools.cache
def machine_id() -> str:
    """Return eight characters for the machine and process namespace of this process."""
    namespace = Path("/proc/self/ns/pid")
    inside = str(namespace.stat().st_ino) if namespace.exists() else ""
    return hashlib.blake2b(f"{socket.gethostname()} {inside}".encode(), digest_size=4).hexdigest()


def unique_name(path: Path, kind: str = "partial") -> Path:
    """Return a hidden name next to `path`, with its suffix, that no other process uses.

    Args:
        path: the final name.
        kind: `partial` or `replaced`.
    """
    shown = path.name.encode()[:120].decode(errors="ignore")
    return path.with_name(f".{shown}.{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}{path.suffix}")


def alive(pid: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


_swept: set[tuple[int, str]] = set()


def sweep(folder: Path, again: bool = True) -> None:
    """Remove what killed processes left in a folder, and restore what they had moved aside.

    Partials of living processes, of other machines (until they are a day old) and files of other names are left alone.

    Args:
        again: look although this process has looked before.
    """
    mark = (os.getpid(), str(folder))
    if (mark in _swept and not again) or not folder.is_dir():
        return
    _swept.add(mark)
    for path in list(folder.iterdir()):
        found = MADE_HERE.fullmatch(path.name)
        if found is None or not _left_behind(path, found):
            continue
        target = path.with_name(found["name"])
        if found["kind"] == "replaced" and not os.path.lexists(target):
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _left_behind(path: Path, found: re.Match[str]) -> bool:
    """Return whether the process that made a partial is gone."""
    if found["host"] == machine_id():
        return not alive(int(found["pid"]))
    try:
        return time.time() - path.lstat().st_mtime > DAY
    except FileNotFoundError:
        return False


# -- writing -----------------------------------------------------------------------------------------------------------


def to_disk(path: Path) -> None:
    """Write a file, or a folder's entries, from the system's cache to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # some network file systems do not sync folders
            raise
    finally:
        os.close(number)


def make_folder(folder: Path) -> None:
    """Make a folder and those that lead to it, with their entries on the disk.

    Raises:
        RunError: a file has the name of one of them.
    """
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        if place.is_file():
            raise RunError(f"{place} is a file, a folder is to be made there; use another name")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    _real(folder).mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        to_disk(place.parent)


def _real(path: Path) -> Path:
    """Return where a symbolic link leads, so that the link stays and its target is replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def atomic_file(path: Path, kept: str = KEPT) -> Iterator[Path]:
    """Yield a partial file to write, which takes the name `path` at the end or is removed.

    Folders that lead there are made. A symbolic link is followed.

    Args:
        path: the name it takes.
        kept: what survives a full disk, named in the message.

    Raises:
        RunError: the disk is full, or the place cannot be written.
    """
    path = _real(path)
    partial = unique_name(path)
    with saving(path, kept):
        make_folder(path.parent)
        sweep(path.parent, again=False)
        try:
            yield partial
            to_disk(partial)
            os.replace(partial, path)
            to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def atomic_text(path: Path, text: str, kept: str = KEPT) -> None:
    r"""Write a text file whole or not at all, with a lone surrogate as JSON's `\udcff`.

    Args:
        path: the name it takes.
        text: its content.
        kept: what survives a full disk, named in the message.
    """
    with atomic_file(path, kept) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_folder(path: Path, kept: str = KEPT) -> Iterator[Path]:
    """Yield a partial folder to fill, which takes the name `path` at the end or is removed.

    A folder that has the name already is replaced as a whole where davae wrote it. A symbolic link is followed. The new
    folder carries the mark by which it is known later (see `ownership`).

    Args:
        path: the name it takes.
        kept: what survives a full disk, named in the message.

    Raises:
        RunError: the disk is full, the place cannot be written, `path` is a file, or a folder that davae did not write.
    """
    given = Path(os.path.abspath(path))
    path = _real(given)
    if path.is_file():
        raise RunError(f"{path} is a file, a folder is to be made there; use another name")
    check_replaceable(given)
    partial = unique_name(path)
    with saving(path, kept):
        make_folder(path.parent)
        sweep(path.parent)
        partial.mkdir()
        try:
            yield partial
            mark(partial)
            check_replaceable(given)  # hours may have passed
            for written in [*partial.rglob("*"), partial]:
                if not written.is_symlink():
                    to_disk(written)
            _take_name(partial, path)
            to_disk(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial: Path, path: Path) -> None:
    """Rename a folder to `path`, in place of a folder that has the name already.

    Raises:
        RunError: the file system cannot rename folders.
    """
    aside: list[Path] = []
    try:
        for _ in range(SWAPS):
            try:
                if path.is_dir() and any(path.iterdir()):
                    aside.append(unique_name(path, "replaced"))
                    path.rename(aside[-1])
                partial.rename(path)
                break
            except FileNotFoundError:
                if not partial.is_dir():
                    raise
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    raise RunError(
                        f"{path.parent}: this file system cannot rename folders; use a folder on a local disk, NFS or Lustre"
                    ) from error
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process took the name in between
                    raise
        else:
            raise RunError(f"{path} is being written by too many processes at once; run the command again")
    finally:
        for old in reversed(aside):
            if not os.path.lexists(path) and old.is_dir():
                try:
                    old.rename(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process took the name meanwhile
                        raise
            shutil.rmtree(old, ignore_errors=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, kept: str = KEPT
) -> None:
    """Write a safetensors file whole or not at all, with a checksum per tensor.

    Args:
        path: the name it takes; folders that lead there are made.
        tensors: by name.
        metadata: of the file.
        kept: what survives a full disk, named in the message.
    """
    from safetensors.torch import save_file  # imports torch, which `davae --help` does without

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, kept) as partial:
        save_file(whole, partial, {**(metadata or {}), **tensor_sums(whole, metadata)})


@contextmanager
def model_folder(path: Path, kept: str = KEPT) -> Iterator[Path]:
    """Yield a partial folder for a model, which appears whole and with checksums."""
    with atomic_folder(path, kept) as partial:
        yield partial
        write_sums(partial)
