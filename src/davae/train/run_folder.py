"""Run folders and checkpoints: written whole or not at all, resumed to the bit."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.errors import RecipeError, RunError
from davae.files.atomic import atomic_folder, atomic_text, make_folder, require_space, saving, sweep
from davae.files.checksums import file_sum
from davae.files.ownership import check_run, unowned
from davae.files.reading import load_json, whole_number
from davae.recipes import Recipe, differences, dump_recipe, validate
from davae.recipes.loading import AnyRecipe
from davae.recipes.stages import POLISH
from davae.recipes.values import read_yaml_file
from davae.train.distributed import barrier, from_main, is_main
from davae.train.locking import LOCK, RunLock

logger = logging.getLogger(__name__)

CHECKPOINT_KEPT = "the last checkpoint is whole"


def marker(folder: Path, step: str) -> Path:
    """Return the file that marks a step of a run as done."""
    return folder / "checkpoints" / f"{step}.done"


def was_done(folder: Path, step: str) -> bool:
    """Return whether a step of the run in a folder was done, with any step counts."""
    return marker(folder, step).is_file()


def goal(recipe: AnyRecipe, step: str) -> str:
    """Return the step counts that a step's marker contains when it is done.

    Raising `max_steps` makes the step, and all that follow from it, due again. Those of a polish are joined to stage 1's by
    `+`: stage 1 and the cache do not depend on them.
    """
    sections = [getattr(recipe, name, None) for name in ("vae", "dit", "stage1", "stage2", "network")]
    goals = [str(section.max_steps) for section in sections if section is not None]
    if step in {"stage1", "cache", "vae"}:
        return goals[0]
    if isinstance(recipe, Recipe) and recipe.stage1.polish is not None:
        goals[0] += f"+{recipe.stage1.polish.max_steps}"
    return goals[0] if step == POLISH else "/".join(goals)


def trained_before(folder: Path, recipe: AnyRecipe) -> bool:
    """Return whether stage 2 of a run was trained and exported, with any polish or none."""
    file, plain = marker(folder, "stage2"), re.compile(r"\+\d+")
    return file.is_file() and plain.sub("", file.read_text("utf-8")) == plain.sub("", goal(recipe, "stage2"))


def is_done(folder: Path, recipe: AnyRecipe, step: str) -> bool:
    """Return whether a step of the run in a folder is done with this recipe's step counts."""
    file = marker(folder, step)
    return file.is_file() and file.read_bytes() == goal(recipe, step).encode()


class RunFolder:
    """Files of one run. Opening refuses the folder of another recipe, and one that is in use.

    Of several processes of one launch the first one opens, locks and writes; the others only read.
    """

    def __init__(self, path: Path | str, recipe: AnyRecipe):
        self.path, self.recipe = Path(path), recipe
        self._lock: RunLock | None = None
        if is_main():
            self._open()

    def _open(self) -> None:
        recipe = self.recipe
        saved = self.path / "recipe.yaml"
        if saved.is_file():
            try:
                previous = validate(read_yaml_file(saved, f"recipe {saved}"), str(saved))
            except RecipeError as error:
                raise RunError(
                    f"{saved} was written by another version of davae ({error}); use a new --out"
                ) from error
            kept = self.begun or not (self.path / LOCK).is_file()  # else davae wrote it, and nothing follows from it
            if kept and type(previous) is not type(recipe):
                raise RunError(f"{self.path} holds a run of recipe '{previous.name}'; use another --out")
            if kept and (changed := differences(previous, recipe)):
                shown = "; ".join(changed[:3]) + (f" (and {len(changed) - 3} more)" if len(changed) > 3 else "")
                raise RunError(
                    f"{self.path} holds a run of another recipe: {shown}; use another --out, or the same values"
                )
        check_run(self.path, self.done)
        with saving(self.path):
            make_folder(self.path / "checkpoints")
        self._lock = RunLock(self.path)
        atomic_text(saved, dump_recipe(recipe))
        for place in (self.path, self.path / "checkpoints"):
            put_back(place)

    def close(self) -> None:
        """Release the folder to other runs."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def begun(self) -> bool:
        """True after a training or a cache began. Until then the folder takes another recipe."""
        made = ("metrics.jsonl", "checkpoints/*", "cache*/*", "base/*")
        return any(any(self.path.glob(pattern)) for pattern in made)

    def done(self, step: str) -> bool:
        """Return whether a step of the run finished with the recipe's step counts."""
        return is_done(self.path, self.recipe, step)

    def due(self, step: str) -> bool:
        """Return whether a step is to be done, as the first process sees its files. Collective."""
        return not from_main(self.done(step))

    def mark_done(self, step: str) -> None:
        if is_main():
            atomic_text(marker(self.path, step), goal(self.recipe, step))
        barrier()

    def checkpoints(self, stage: str) -> list[Path]:
        """Return the complete checkpoints of a stage, oldest first."""
        found = (self.path / "checkpoints").glob(f"{stage}-[0-9]*")
        return sorted(path for path in found if path.name.rpartition("-")[2].isdecimal() and path.is_dir())


def put_back(folder: Path) -> None:
    """Put back folders that a kill inside `atomic_folder` left moved aside without a successor."""
    sweep(folder)
    for old in folder.glob(".*.old"):  # the name that davae 0.1 moved a folder to
        name = folder / old.name.removeprefix(".").removesuffix(".old")
        if old.is_symlink() or not old.is_dir() or unowned(old) is not None:
            continue
        if name.exists():
            shutil.rmtree(old)
        else:
            old.rename(name)


STATE = "state.pt"


def state_bytes(state: Any) -> int:
    """Return how many bytes the tensors of a nested state take."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(state_bytes(value) for value in values)


def save_checkpoint(
    folder: RunFolder, stage: str, step: int, state: dict[str, Any], keep: int, spared: Callable[[int], bool]
) -> Path:
    """Write `<stage>-<step>` atomically, then delete all but the newest and the spared ones."""
    target = folder.path / "checkpoints" / f"{stage}-{step:08d}"
    require_space(target, state_bytes(state), "a checkpoint")
    with atomic_folder(target, CHECKPOINT_KEPT) as partial:
        torch.save(state, partial / STATE)
        meta = {"stage": stage, "step": step, "crc32": file_sum(partial / STATE)}
        meta["recipe"] = folder.recipe.model_dump(mode="json")
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for old in folder.checkpoints(stage)[:-keep]:
        if not spared(int(old.name.rpartition("-")[2])):
            shutil.rmtree(old)
    return target


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, mapped from its file.

    Raises:
        RunError: the file was cut off or changed since it was written.
    """
    try:
        meta = load_json((path / "meta.json").read_text(encoding="utf-8"))
        if file_sum(path / STATE) != meta["crc32"]:
            raise RunError(f"{STATE} is not what was written (its checksum differs)")
        if f"{meta['stage']}-{meta['step']:08d}" not in path.name:  # it may be called `earlier-...` by now
            raise RunError(f"it holds step {meta['step']} of {meta['stage']}")
        # mapped, not read: the processes of a machine share one copy, which the system takes back when it needs it
        return torch.load(str(path / STATE), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"checkpoint {path} cannot be read: {reason}") from error


def check_same_recipe(path: Path, recipe: AnyRecipe) -> None:
    """Compare the recipe of a checkpoint with this one, whatever `recipe.yaml` holds by now.

    Raises:
        RunError: they train something else: `recipe.yaml` was changed by hand, or is damaged.
    """
    stored = load_json((path / "meta.json").read_text(encoding="utf-8")).get("recipe")
    if stored is None:  # written by an earlier version
        return
    try:
        before = validate(stored, str(path))
    except RecipeError as error:
        logger.warning("%s: its recipe is one of another version of davae and is not compared (%s)", path, error)
        return
    if changed := differences(before, recipe):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RunError(
            f"{path} was trained with another recipe: {changed[0]}{more}; put the value back in {path.parent.parent}/"
            "recipe.yaml, or use a new --out"
        )


def rename_aside(path: Path, word: str) -> None:
    """Rename a checkpoint to `<word>-NAME`, or to the first free of `<word>-2-NAME` and so on."""
    words = itertools.chain([word], (f"{word}-{number}" for number in itertools.count(2)))
    places = (path.with_name(f"{name}-{path.name}") for name in words)
    path.rename(next(place for place in places if not os.path.lexists(place)))


def newest_checkpoint(folder: RunFolder, stage: str) -> dict[str, Any] | None:
    """Return the newest checkpoint that can be read, and rename broken ones to `broken-...`.

    Every process of a launch gets the same one.

    Raises:
        RunError: there are checkpoints, and none can be read.
    """
    chosen: Path | None = None
    state: dict[str, Any] | None = None
    failure = ""
    for path in reversed(folder.checkpoints(stage) if is_main() else []):
        try:
            chosen, state = path, load_checkpoint(path)
            break
        except RunError as error:
            reason = str(error)
            failure = failure or reason
            logger.warning("%s; going back to the one before", reason)
    if failure and state is None:
        raise RunError(f"{failure}, and none before it; use a new --out to start again")
    if chosen is not None and failure:
        for path in folder.checkpoints(stage):
            if path > chosen:
                rename_aside(path, "broken")
    if chosen is not None:
        check_same_recipe(chosen, folder.recipe)
    chosen = from_main(chosen)
    return state if chosen is None or is_main() else load_checkpoint(chosen)


class Metrics:
    """Writer of metrics.jsonl that drops, after a resume, the steps that will be logged again."""

    def __init__(self, path: Path, stage: str, resumed_step: int):
        self.path, self.stage = path, stage
        kept = [record for record in read_metrics(path) if record["stage"] != stage or record["step"] <= resumed_step]
        atomic_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        with saving(self.path, CHECKPOINT_KEPT):
            self._stream.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
            self._stream.flush()

    def to_disk(self) -> None:
        """Bring the lines to the disk, before the checkpoint of their steps."""
        with saving(self.path, CHECKPOINT_KEPT):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl or timing.jsonl, and name damaged lines in the log."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = load_json(line)
            numbers = [value for name, value in record.items() if name != "stage"]
            if not (
                isinstance(record["stage"], str) and type(record["step"]) is int and all(map(is_number, numbers))
            ):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s: dropped line %d, which a crash cut off or the disk has damaged", path, number)
        else:
            records.append(record)
    return records


def is_number(value: Any) -> bool:
    """Return whether a logged value can be drawn and averaged."""
    return isinstance(value, (int, float)) and (isinstance(value, float) or abs(value) < 2**63)


def changed_inputs(folder: RunFolder, stage: str, inputs: Mapping[str, str]) -> list[str]:
    """Return the inputs of a stage that changed since its checkpoints, noted before the first.

    Args:
        folder: the run.
        stage: whose checkpoints are meant.
        inputs: name -> hash.
    """
    path = folder.path / "checkpoints" / f"{stage}-inputs.json"
    if path.is_file() and (folder.checkpoints(stage) or was_done(folder.path, stage)):
        try:
            known = load_json(path.read_bytes())
            if changed := [name for name in inputs if known[name] != inputs[name]]:
                return changed
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; what %s was trained on before is not compared", path, stage)
    atomic_text(path, json.dumps(dict(inputs)))
    return []


def set_aside(folder: RunFolder, stage: str) -> None:
    """Rename a stage's checkpoints, so that it begins again and they stay for inspection."""
    for path in folder.checkpoints(stage):
        rename_aside(path, "earlier")
    marker(folder.path, stage).unlink(missing_ok=True)
    if was_done(folder.path, "report"):  # it is about the weights that are now set aside
        atomic_text(marker(folder.path, "report"), "earlier weights")


def check_stage_inputs(folder: RunFolder, stage: str, inputs: Mapping[str, str], first: Path) -> None:
    """Compare the inputs of a stage with those of its start, and begin again where one is new.

    Args:
        folder: the run.
        stage: the training.
        inputs: name -> hash.
        first: folder of the run that made them.

    Raises:
        RunError: another run (`--stage1`) has made one anew since.
    """
    if not (changed := changed_inputs(folder, stage, inputs)):
        return
    name = {"stage2": "stage 2"}.get(stage, stage)
    what = f"{' and '.join(changed)} changed since {name} began"
    if first != folder.path:
        raise RunError(f"--stage1 {first}: {what}, whose weights belong to the earlier; use a new --out")
    logger.warning("%s: %s; %s begins again, its checkpoints are now named earlier-*", folder.path, what, name)
    set_aside(folder, stage)
    changed_inputs(folder, stage, inputs)


BEST = "validation_loss"


class Best:
    """The lowest validation loss of a stage so far, and the step that reached it.

    Args:
        folder: of the run.
        stage: whose checkpoints are meant.
    """

    def __init__(self, folder: Path, stage: str):
        self.path, self.value = folder / "checkpoints" / f"{stage}-best.json", math.inf

    def kept(self) -> int:
        """Return the step whose checkpoint is kept, -1 where no step was validated."""
        try:
            return whole_number(load_json(self.path.read_bytes())["step"])
        except FileNotFoundError:
            return -1
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; the checkpoint that validated best is not known any more", self.path)
            return -1

    def improved(self, values: Mapping[str, float], step: int) -> bool:
        """Return whether this step validated better than all before, and note it."""
        if BEST not in values or not values[BEST] < self.value:
            return False
        self.value = values[BEST]
        if is_main():
            atomic_text(self.path, json.dumps({"step": step, BEST: self.value}))
        return True
