"""Images of an interrupted command, kept for equal prompts, settings and weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from davae.errors import ModelError, RunError
from davae.files.atomic import MADE_HERE, atomic_text
from davae.files.ownership import LITTER, check_no_part, only_writer
from davae.files.reading import load_json

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"


@contextmanager
def kept_images(
    folder: Path,
    settings: dict[str, Any],
    about: dict[str, Any],
    *,
    former: dict[str, Any] | None = None,
    check_former: Callable[[], None] = lambda: None,
    first: bool = True,
) -> Iterator[None]:
    """Hold a folder for one process, after a check that its images have these settings.

    Args:
        folder: where the images lie, with `settings.json`; made where it is absent.
        settings: what the images depend on.
        about: what a reader may want to know too, and no image depends on: names and paths.
        former: what davae versions without fingerprints wrote for the same command.
        check_former: raises where the images of such a version are not those of the same prompts.
        first: whether this is the first process of its launch, which holds the folder for all of them.

    Raises:
        ModelError: the images there are of other settings; names the first one that differs.
        RunError: the folder holds something that davae did not draw, or another process draws into it.
    """
    check_no_part(folder)
    with only_writer(folder) if first else nullcontext():
        path = folder / SETTINGS
        folder.mkdir(parents=True, exist_ok=True)
        ours = {SETTINGS, *LITTER}
        others = [e.name for e in folder.iterdir() if e.name not in ours and not MADE_HERE.fullmatch(e.name)]
        if path.is_file():
            _compare(path, settings, set(about), former, check_former, drawn=bool(others))
        elif others:
            raise RunError(f"{folder}: it holds {min(others)!r} and no {SETTINGS}; use another --out")
        text = json.dumps({**settings, **about}, indent=2) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic_text(path, text)
        yield


def _compare(
    path: Path,
    settings: dict[str, Any],
    about: set[str],
    former: dict[str, Any] | None,
    check_former: Callable[[], None],
    drawn: bool,
) -> None:
    """Refuse other settings where images were drawn, and a file that is none of davae's."""
    try:
        old = load_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON; remove it with the images around it, or use another --out") from error
    if not isinstance(old, dict):
        raise RunError(f"{path}: not the settings of images; use another --out")
    new = json.loads(json.dumps(settings))
    if "weights" not in old and former is not None and old == json.loads(json.dumps(former)):
        check_former()
        logger.warning("%s: images of an earlier davae, which kept no fingerprint of the weights", path.parent)
        return
    differing = [name for name in {**new, **old} if name not in about and old.get(name) != new.get(name)]
    if differing and (drawn or not set(new) <= set(old)):
        name, values = differing[0], f"{old.get(differing[0])}, now {new.get(differing[0])}"
        found = f"the {name} changed" if name in ("weights", "prompts") else f"{name}: {values}"
        raise ModelError(f"{path.parent} holds images of other settings ({found}); use another --out")


def stretches(numbers: list[int], longest: int) -> list[tuple[int, int]]:
    """Return (first, one past the last) of stretches of at most `longest` rising numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number and number - found[-1][0] < longest:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
