"""Open a model by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from davae.backbones.classes import class_number, goes_by_class
from davae.errors import ModelError
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import FULL, Placement
from davae.publish.assemble import load_upgraded
from davae.zoo import SHIPPED, UPGRADES, resolve


def model_places(name: str) -> list[str]:
    """Return the folders or hub ids that a model is loaded from, by the names that `open_model` takes.

    Raises:
        ModelError: a run that has no pipeline yet.
    """
    folder = Path(name)
    if name in SHIPPED:
        return [resolve(SHIPPED[name]), str(UPGRADES[SHIPPED[name]])]
    if (folder / "pipeline" / "model_index.json").is_file():
        return [str(folder / "pipeline")]
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"run {name} has no pipeline yet; run its `davae upgrade` command to the end")
    return [resolve(name)]


def open_model(
    name: str, placement: Placement = FULL, prepare: Callable[[Any], None] = lambda pipeline: None
) -> tuple[Any, Path]:
    """Return (pipeline on its device, folder for its samples) of a run or pipeline folder, embedded model or hub id.

    Args:
        name: `micro-upgraded` is the embedded model with the upgrade that ships with it.
        placement: where it computes, and how exactly.
        prepare: changes the loaded pipeline before it is placed.
    """
    place, *upgrades = model_places(name)
    pipeline = load_pipeline(place, placement.dtype)
    for upgrade in upgrades:
        pipeline = load_upgraded(pipeline, Path(upgrade))
    own = Path(place) == Path(name) / "pipeline"
    prepare(pipeline)
    return placement.place(pipeline), Path(name) / "samples" if own else Path("samples") / Path(name).name


def check_classes(pipeline: Any, prompts: list[str]) -> None:
    """ModelError when a class-conditional pipeline is asked for a class it does not have."""
    if goes_by_class(pipeline):
        for prompt in prompts:
            try:
                class_number(pipeline, prompt)
            except ValueError as error:
                raise ModelError(str(error)) from error


def open_text_model(name: str, placement: Placement = FULL) -> Any:
    """A text-to-image pipeline by name; ModelError for a class-conditional one."""
    model, _ = open_model(name, placement)
    if goes_by_class(model):
        raise ModelError(f"{name} draws classes, not prompts")
    return model
