"""Run folders and checkpoints: written whole or not at all, resumed to the bit."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from davae.recipes import RecipeError, differences, dump_recipe, validate
from davae.recipes.loading import AnyRecipe

logger = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A run that cannot go on; the message is one readable line."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; everything is saved."""


class RunFolder:
    """One run's files (DESIGN, section 10). Opening it refuses another recipe's folder."""

    def __init__(self, path: Path | str, recipe: AnyRecipe):
        self.path, self.recipe = Path(path), recipe
        saved = self.path / "recipe.yaml"
        if saved.is_file():
            import yaml

            try:
                previous = validate(yaml.safe_load(saved.read_text(encoding="utf-8")), str(saved))
            except RecipeError as error:
                raise RunError(
                    f"{saved} was written by another version of davae ({error}); use a new --out"
                ) from error
            if type(previous) is not type(recipe):
                raise RunError(f"{self.path} holds a run of recipe '{previous.name}'; use another --out")
            changed = differences(previous, recipe)
            if changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                raise RunError(
                    f"{self.path} holds a run of another recipe: {changed[0]}{more}; use another --out, or the same values"
                )
        with saving(self.path):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            replace_text(saved, dump_recipe(recipe))
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{self.path} is in use by another davae process; wait for it or use another --out"
            ) from error

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.close()

    def done(self, step: str) -> bool:
        """Whether a step of the run finished with the step count the recipe asks for."""
        marker = self.path / "checkpoints" / f"{step}.done"
        return marker.is_file() and marker.read_text() == self._goal(step)

    def mark_done(self, step: str) -> None:
        replace_text(self.path / "checkpoints" / f"{step}.done", self._goal(step))

    def _goal(self, step: str) -> str:
        """What the step was asked to do: a longer training makes it, and what follows from it, due again."""
        sections = [getattr(self.recipe, name, None) for name in ("vae", "dit", "stage1", "stage2", "network")]
        goals = [str(section.max_steps) for section in sections if section is not None]
        return "/".join(goals[:1] if step in {"stage1", "cache", "vae"} else goals)

    def checkpoints(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        return sorted((self.path / "checkpoints").glob(f"{stage}-[0-9]*"))


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise RunError(
                f"cannot write {path}: {os.strerror(error.errno)}; the last checkpoint is whole, "
                "free space and run the same command again"
            ) from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with saving(path):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only once it is complete; a half-written one is removed."""
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with saving(path):
        partial.mkdir(parents=True)
        try:
            yield partial
            if path.exists():
                path.rename(old)
            partial.rename(path)
        finally:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(folder: RunFolder, stage: str, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `<stage>-<step>` atomically, then drop all but the newest `keep`."""
    target = folder.path / "checkpoints" / f"{stage}-{step:08d}"
    with new_folder(target) as partial:
        try:
            torch.save(state, partial / "state.pt")
        except RuntimeError as error:  # torch reports a full disk as a failed archive write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        (partial / "meta.json").write_text(json.dumps({"stage": stage, "step": step}), encoding="utf-8")
    for old in folder.checkpoints(stage)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


class Metrics:
    """metrics.jsonl: one object a logged step. Reopening after a resume drops what the resumed run will log again."""

    def __init__(self, path: Path, stage: str, resumed_step: int):
        self.path, self.stage = path, stage
        kept = [record for record in read_metrics(path) if record["stage"] != stage or record["step"] <= resumed_step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        with saving(self.path):
            self._stream.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropped a line that a crash cut off", path)
    return records
