"""Folders that the page offers by name: a visitor chooses a name, never a path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from davae.app.forms import one_of
from davae.errors import ModelError, RunError
from davae.zoo import MODELS
from davae.zoo.presets import presets

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
LISTED = 1000  # names of a folder that are offered
RECIPES_OWN = "the recipe's own"


@dataclass(frozen=True)
class Roots:
    """Folders of the owner whose direct entries the page offers.

    Attributes:
        data: folder of image folders and `.tar` files.
        models: folder of diffusers models, run folders or exported pipelines.
        model: name or folder of the base model that the page was opened with.
    """

    data: Path | None = None
    models: Path | None = None
    model: str | None = None

    def data_names(self) -> list[str]:
        """Return the names to train on: what the recipe names, then the entries of the data root."""
        return [RECIPES_OWN, *_entries(self.data, lambda path: path.is_dir() or path.suffix == ".tar")]

    def data_source(self, name: object) -> str | None:
        """Return the path of a name to train on, None for what the recipe names.

        Raises:
            FormError: not one of `data_names`.
        """
        chosen = one_of("images", name, self.data_names())
        return None if chosen == RECIPES_OWN or self.data is None else str(Path(os.path.realpath(self.data)) / chosen)

    def model_names(self) -> list[str]:
        """Return the models to inspect.

        These are the page's own, the embedded ones, the entries of the models root and the presets.
        """
        own = [] if self.model is None else [label(self.model)]
        return list(dict.fromkeys([*own, *MODELS, *_entries(self.models, _is_model), *presets()]))

    def model_source(self, name: object) -> str:
        """Return the path or name of a model to inspect.

        Raises:
            FormError: not one of `model_names`.
            ModelError: a run folder without an export yet.
        """
        chosen = one_of("model", name, self.model_names())
        if self.model is not None and chosen == label(self.model):
            return self.model
        if self.models is None or chosen in MODELS or chosen not in _entries(self.models, _is_model):
            return chosen
        folder = Path(os.path.realpath(self.models)) / chosen
        if (folder / "model_index.json").is_file():
            return str(folder)
        pipeline = folder / "pipeline"
        if not Path(os.path.realpath(pipeline)).is_relative_to(Path(os.path.realpath(self.models))):
            raise ModelError(f"model {chosen}: its pipeline lies elsewhere; copy it below the models root")
        return str(pipeline)


def open_roots(data: Path | None, models: Path | None, model: str | None = None) -> Roots:
    """Return the roots, all of which are folders.

    Args:
        data, models: value of `--data-root` and `--models-root`.
        model: that the page was opened with.

    Raises:
        RunError: one that is not a folder.
    """
    for option, folder in (("--data-root", data), ("--models-root", models)):
        if folder is not None and not folder.is_dir():
            raise RunError(f"{option}: {folder} is not a folder; name the folder that holds them")
    return Roots(data, models, model)


def label(model: str) -> str:
    """Return the name under which the page shows a model: of a folder, its last part."""
    return Path(os.path.realpath(model)).name if Path(model).is_dir() else model


def _is_model(path: Path) -> bool:
    return any((path / place / "model_index.json").is_file() for place in ("", "pipeline"))


def _entries(root: Path | None, wanted: Callable[[Path], bool]) -> list[str]:
    """Return sorted names of the direct entries of a folder, without links that lead out of it."""
    if root is None or not root.is_dir():
        return []
    real, names = Path(os.path.realpath(root)), []
    with os.scandir(root) as entries:
        for entry in entries:
            path = real / entry.name
            if not NAME.fullmatch(entry.name) or not Path(os.path.realpath(path)).is_relative_to(real):
                continue
            if path.exists() and wanted(path):
                names.append(entry.name)
    return sorted(names)[:LISTED]
