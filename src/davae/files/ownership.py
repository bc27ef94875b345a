"""Folders that davae wrote: their marks, leave to replace them, and one writer at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

import davae
from davae.errors import RunError
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

MARK = ".davae.json"  # lies in every folder that davae writes as a whole
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers leave them anywhere
CACHES = {"__pycache__", ".cache"}  # python and huggingface_hub leave them in model folders
CARD = "Made with davae "  # a sentence of every model card
RUN_PARTS: dict[str, tuple[str, ...]] = {  # what a run writes, and the steps after which the run only reads it
    "base": ("base",),
    "bench-cache": (),
    "cache": ("cache",),
    "checkpoints": (),
    "log.txt": (),
    "metrics.jsonl": (),
    "pictures.json": (),
    "pipeline": ("stage2", "dit"),
    "polished": ("stage1.polish",),
    "progress": (),
    "report.html": (),
    "report.json": (),
    "times.json": (),
    "timing.jsonl": (),
    "upgrade.safetensors": (),
    "vae": ("stage1", "vae"),
}
# files of diffusers' and davae's folders, for folders of davae versions that left no mark
KNOWN = re.compile(
    r"(config|generation_config|model_index|preprocessor_config|processor_config|scheduler_config|tokenizer|meta|"
    r"tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|checksums)\.json|(merges|vocab)\.txt|spiece\.model|"
    r"tokenizer\.model|chat_template\.jinja|(diffusion_pytorch_model|model|pytorch_lora_weights|upgrade)[\w.-]*"
    r"\.(safetensors|index\.json)|README\.md|state\.pt|\w+\.py"
)


# -- marks -----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[str]:
    """Yield the files and links below a folder as relative names, without litter."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = sorted(set(folders) - CACHES - set(links))
        here = Path(place).relative_to(folder)
        for name in sorted(names + links):
            if name not in LITTER and (here / name).as_posix() != MARK:
                yield (here / name).as_posix()


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:  # the folder is being replaced
        return ""


def mark(folder: Path) -> None:
    """Write the mark into a folder: names of its files, and hashes of editable texts."""
    names = list(_files(folder))
    texts = {name: _digest(folder / name) for name in names if name.endswith(".md")}
    values = {"davae": davae.__version__, "files": names, "texts": texts}
    (folder / MARK).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _mark_of(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's mark, None without a readable one."""
    try:
        values = load_json((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("texts", {}), dict):
        return None
    names = values.get("files")
    return values if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def unowned(folder: Path) -> str | None:
    """Return why a folder may not be replaced, None where all that it holds is davae's own.

    A folder is davae's where it carries the mark, or what davae versions without marks always wrote. A link counts as
    what it leads to.
    """
    while True:
        before = _identity(folder)
        reason = _unowned(folder)
        if reason is None or _identity(folder) == before:  # else another process put its own there meanwhile
            return reason


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        about = folder.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _unowned(folder: Path) -> str | None:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else None
    values = _mark_of(folder)
    if values is None:
        return _unowned_before_marks(folder)
    known, texts = set(values["files"]), values.get("texts", {})
    for name in _files(folder):  # no further than the first one that is not davae's: the folder may be a whole disk
        if name not in known:
            return f"it holds {name!r}, which davae did not write"
        if name in texts and _digest(folder / name) != texts[name]:
            return f"{name!r} was edited since davae wrote it"
    return None


def _unowned_before_marks(folder: Path) -> str | None:
    for name in _files(folder):
        if not KNOWN.fullmatch(Path(name).name) or (folder / name).is_symlink():
            return f"it holds {name!r}, which davae did not write"
    empty = next(_files(folder), None) is None and not (folder / MARK).exists()
    if empty or run_of(folder) is not None or _names_davae(folder):
        return None
    return f"davae did not write it (no {MARK} inside)"


def _names_davae(folder: Path) -> bool:
    """Return whether a folder without a mark has davae's model card or one of its classes."""
    card = folder / "README.md"
    whole = any((folder / name).is_file() for name in ("model_index.json", "upgrade.safetensors"))
    if whole and card.is_file():
        return CARD in card.read_text(encoding="utf-8", errors="replace")
    for name in ("model_index.json", "config.json"):
        try:
            values = load_json((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            classes = [value for value in values.values() if isinstance(value, list) and value]
            return values.get("_class_name") in davae.__all__ or any(c[0] == davae.__name__ for c in classes)
    return False


# -- places that a person names --------------------------------------------------------------------------------------


def check_parents(path: Path) -> None:
    """Refuse a path below a file.

    Raises:
        RunError: an existing part of the path is not a folder.
    """
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir():
        raise RunError(f"{path}: {above} is a file, a folder is to be made there; use another --out")


def check_out(out: Path, reads: Iterable[str | Path] = ()) -> None:
    """Refuse a folder to write that holds anything but davae's own, before any work.

    Args:
        out: the folder, which may be absent.
        reads: files and folders that the verb reads; other names, hub ids for example, are left out.

    Raises:
        RunError: in one line, why the folder cannot be written or replaced.
    """
    place = Path(os.path.abspath(out))  # links stay as they are
    real = Path(os.path.realpath(place))
    for source in map(Path, reads):
        if source.exists() and (
            real == Path(os.path.realpath(source)) or real in Path(os.path.realpath(source)).parents
        ):
            raise RunError(f"{out}: it is or holds {source}, which this command reads; use another --out")
    check_no_part(out)
    check_replaceable(place, out)


def check_no_part(path: Path) -> None:
    """Refuse a place inside what a run writes and would take for its own.

    Raises:
        RunError: in one line, whose place it is.
    """
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):  # links lead into runs too
        run = run_of(place)
        if run is not None and place.relative_to(run).parts[0] in RUN_PARTS:
            raise RunError(f"{path}: it belongs to the run {run}; use another --out or name")


def check_replaceable(place: Path, shown: Path | None = None) -> None:
    """Refuse a folder that `atomic_folder` would replace and that davae did not write.

    Args:
        shown: the folder's name in the message.

    Raises:
        RunError: in one line, why.
    """
    shown = shown or place
    if not place.exists():
        check_parents(place)
        return
    real, here = Path(os.path.realpath(place)), Path.cwd()
    reason = "it is or holds the current folder" if real == here or real in here.parents else unowned(place)
    if reason is not None:
        raise RunError(f"{shown}: {reason}; use another --out, or move it away")


# -- runs ------------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Return whether a folder looks like one of davae's runs: a recipe and checkpoints."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()


def run_of(place: Path) -> Path | None:
    """Return the run folder that a place lies in, None where it lies in none."""
    return next((above for above in place.parents if is_run(above)), None)


def check_run(folder: Path, done: Callable[[str], bool]) -> None:
    """Refuse a run folder in which the run would write over what is not its own.

    Args:
        folder: the run's folder, which may be absent; its recipe was read before.
        done: whether a step of the run is done, so that its results are only read.

    Raises:
        RunError: in one line, what is in the way.
    """
    if not folder.is_dir():
        if folder.exists():
            raise RunError(f"{folder}: it is a file; use another --out")
        check_parents(folder)
        return
    present = [name for name in RUN_PARTS if _in_the_way(folder / name)]
    if present and not is_run(folder):
        raise RunError(f"{folder}: it holds '{present[0]}' and is not a run of davae; use another --out")
    for name in present:
        place = folder / name
        if any(map(done, RUN_PARTS[name])):
            continue
        if name in ("vae", "polished", "pipeline"):
            check_replaceable(place)


def _in_the_way(place: Path) -> bool:
    """Return whether something is there, an empty folder aside."""
    return place.is_symlink() or (any(place.iterdir()) if place.is_dir() else place.exists())


# -- one writer ------------------------------------------------------------------------------------------------------


def lock_folder(folder: Path) -> int | None:
    """Lock a folder against other davae processes, until the returned descriptor is closed.

    Returns:
        An open descriptor, or None where the system or the file system has no such locks.

    Raises:
        RunError: another process holds the lock.
    """
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return None
    try:
        free = lock_descriptor(number, blocking=False)
    except OSError as error:
        os.close(number)
        logger.warning("%s cannot be locked (%s): run one davae at a time here", folder, error.strerror)
        return None
    if not free:
        os.close(number)
        raise RunError(f"{folder}: another davae process writes here; wait for it or use another --out")
    return number


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is absent.

    Raises:
        RunError: another process holds it, or the folder cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    check_parents(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: it is a file; use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    number = lock_folder(folder)
    try:
        yield
    finally:
        if number is not None:
            os.close(number)
