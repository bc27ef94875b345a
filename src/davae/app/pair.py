"""The models of a page: an upgrade and its base, one computation at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from davae.errors import ModelError
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import own_device
from davae.pretrained.shapes import default_resolution
from davae.publish.assemble import load_upgraded
from davae.recipes import Recipe, load_recipe
from davae.sample.open import open_model
from davae.train.locking import base_home
from davae.vae.base import base_channels
from davae.vae.detail_vae import DetailVAE
from davae.zoo import SHIPPED, resolve, shipped_upgrade

LOCK = threading.Lock()  # held while a model computes: visitors wait, and times are those of one image


class Stopped(Exception):
    """End of a computation that its visitor stopped."""


@dataclass(frozen=True)
class Pair:
    """Upgraded pipeline and the base that it came from, one of which may be missing."""

    name: str
    base: Any | None
    upgraded: Any | None

    @property
    def scale(self) -> int:
        """Side of an upgraded image over the side of the base's, s."""
        return 2 if self.upgraded is None else int(self.upgraded.vae.layout.scale)

    @property
    def resolution(self) -> int:
        """Side of an upgraded image in pixels."""
        if self.upgraded is not None:
            return default_resolution(self.upgraded)
        return default_resolution(self.base) * self.scale

    @property
    def any(self) -> Any:
        """The upgraded pipeline, else the base."""
        return self.base if self.upgraded is None else self.upgraded


def open_pair(name: str, base: str | None = None) -> Pair:
    """Open an upgrade with its base, from the name of either.

    Args:
        name: an embedded model, a run or pipeline folder, or a hub id.
        base: the base's folder or hub id; by default the one that the run's recipe names.

    Raises:
        ModelError: nothing that can be opened, or a base of other channels than the upgrade's.
    """
    device = own_device()
    shipped = shipped_upgrade(SHIPPED.get(name, name))
    if shipped is not None:
        pipeline = load_pipeline(resolve(SHIPPED.get(name, name))).to(device)
        return Pair(name, pipeline, load_upgraded(pipeline, shipped))
    pipeline = open_model(name)[0]
    if not isinstance(pipeline.vae, DetailVAE):
        return Pair(name, pipeline, None)
    source = base or _recorded_base(Path(name))
    if source is None:
        return Pair(name, None, pipeline)
    opened = load_pipeline(resolve(source)).to(device)
    if isinstance(opened.vae, DetailVAE):
        raise ModelError(
            f"base {source} was upgraded itself; give the model that {name} was upgraded from with --base"
        )
    found, needed = base_channels(opened.vae.config, type(opened.vae).__name__), pipeline.vae.layout.base_channels
    if found != needed:
        raise ModelError(f"base {source} has {found} latent channels, {name} was upgraded from {needed}; use --base")
    return Pair(name, opened, pipeline)


def _recorded_base(run: Path) -> str | None:
    """Return the base model that a run folder's recipe names or trained."""
    if not (run / "recipe.yaml").is_file():
        return None
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert isinstance(recipe, Recipe)
    return recipe.base.model or str(base_home(run) / "base" / "pipeline")


@contextmanager
def watched(module: nn.Module, before_pass: Callable[[int], None]) -> Iterator[None]:
    """Call a function before each forward pass of a module, whose errors end the computation.

    Args:
        module: to watch.
        before_pass: called with the number of passes done.
    """
    done = 0

    def hook(*_: Any) -> None:
        nonlocal done
        before_pass(done)
        done += 1

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
