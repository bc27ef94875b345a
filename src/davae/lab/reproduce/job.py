"""Runs of a table's rows, each with the hash of everything that its figures depend on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from davae.data.latent_cache.key import hash_values
from davae.recipes.base import BaseRecipe
from davae.recipes.sections import FlowOptim
from davae.recipes.super_resolution import SuperResolutionRecipe
from davae.recipes.upgrade import Recipe
from davae.zoo import SHIPPED, UPGRADES, resolve

UNUSED = FlowOptim(max_steps=1, batch_size=1)  # the training of a run that ends with its cache
PREPARED = (
    "resolution",
    "autoencoder",
    "architecture",
    "data",
    "vae",
    "cache",
)  # what the cache of a base run depends on


@cache
def model_digest(model: str | None) -> str:
    """Return a hash of a model folder's weights, so that new weights make old figures due again.

    Args:
        model: a folder, an embedded model's name, or another name, whose hash is that of the name.
    """
    files = sorted(Path(resolve(model)).rglob("*.safetensors")) if model is not None else []
    digest = hashlib.sha256(str(model).encode() if not files else b"")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One run of one row. Two rows with the same `key` are the same run."""

    row: str
    seed: int
    command: str

    @property
    @abstractmethod
    def key(self) -> str:
        """Hash of everything that the figures depend on, without defaults.

        New options therefore change no hash.
        """

    @property
    def timed(self) -> bool:
        """Return whether images/s are measured: not where an upgrade draws each image again."""
        return True


@dataclass(frozen=True, kw_only=True)
class UpgradeJob(Job):
    """An upgrade, trained and measured."""

    recipe: Recipe
    measures: dict[str, Any]

    @cached_property
    def key(self) -> str:
        values = self.recipe.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "run", "report", "sampling"}
        )
        return hash_values(values, model_digest(self.recipe.base.model), self.recipe.run.seed, self.measures)

    @cached_property
    def stage1_key(self) -> str:
        """Hash of everything that stage 1 and the cache depend on."""
        fields = {"base", "scale", "detail_channels", "downsample", "data", "stage1", "cache", "init"}
        values = self.recipe.model_dump(mode="json", exclude_defaults=True, include=fields)
        values["stage1"].pop("polish", None)  # each run polishes its own decoder
        if self.recipe.stage2.data is not None:
            values["stage2.data"] = self.recipe.stage2.data.model_dump(mode="json", exclude_defaults=True)
        return hash_values(values, model_digest(self.recipe.base.model), self.recipe.run.seed)


@dataclass(frozen=True, kw_only=True)
class EnlargedJob(Job):
    """Images of the base model, enlarged to the size of an upgrade.

    Attributes:
        recipe: the upgrade; not trained.
        usual: the upgrade without the user's changes; figures of its size keep the hashes they have.
        super_resolution: the network that enlarges them, where one is trained.
        upgrade: the training of the upgrade that enlarges them, where it does.
    """

    recipe: Recipe
    measures: dict[str, Any]
    upscale: str
    usual: Recipe
    super_resolution: SuperResolutionRecipe | None = None
    upgrade: UpgradeJob | None = None

    @property
    def timed(self) -> bool:
        return self.upgrade is None

    @cached_property
    def key(self) -> str:
        if self.upgrade is not None:
            return hash_values(self.upscale, self.upgrade.key)
        network = None if self.super_resolution is None else self.super_resolution.model_dump(mode="json")
        if network is not None and network["data"]["num_workers"] is None:
            network["data"]["num_workers"] = 0  # the default when the first figures were made
        base = model_digest(self.recipe.base.model)
        compared, known = ((recipe.resolution, recipe.data.enlarge) for recipe in (self.recipe, self.usual))
        changed = [] if compared == known else [compared]
        return hash_values(self.upscale, base, network, self.measures["generation"], *changed)


@dataclass(frozen=True, kw_only=True)
class BaseJob(Job):
    """A transformer on an autoencoder's plain latents, by a base recipe.

    Attributes:
        detail: the upgrade whose DetailVAE and cache are used in place of the recipe's autoencoder; runs that agree in
            everything up to the cache share both.
    """

    recipe: BaseRecipe
    measures: dict[str, Any]
    detail: UpgradeJob | None = None

    @cached_property
    def key(self) -> str:
        replaced = {"autoencoder"} if self.detail is not None else set()
        values = self.recipe.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "run", "sampling"} | replaced
        )
        start = None if self.recipe.init is None else model_digest(self.recipe.init)
        return hash_values(values, self.autoencoder_key, start, self.recipe.run.seed, self.measures)

    @cached_property
    def autoencoder_key(self) -> str:
        """Hash of everything that the autoencoder and the cache of its latents depend on."""
        if self.detail is not None:
            return self.detail.stage1_key
        own = self.recipe.autoencoder
        values = self.recipe.model_dump(mode="json", exclude_defaults=True, include=set(PREPARED))
        return hash_values(values, model_digest(own) if isinstance(own, str) else None, self.recipe.run.seed)

    @property
    def prepared(self) -> BaseRecipe:
        """The recipe up to its cache, equal for all runs with the same `autoencoder_key`."""
        parts = {name: getattr(self.recipe, name) for name in PREPARED}
        return BaseRecipe(name="autoencoder", dit=UNUSED, run=self.recipe.run, **parts)


@dataclass(frozen=True, kw_only=True)
class DrawnJob(Job):
    """An existing model, measured without training.

    Attributes:
        pipeline: a folder, an embedded model or a hub id.
        resolution: pixels that are drawn; None is the model's own size.
        compare_at: pixels at which its images are measured; None is the size that is drawn.
        upscale: how images of another size are brought to `compare_at`.
        generation: how images are drawn and measured.
    """

    pipeline: str
    resolution: int | None
    compare_at: int | None
    upscale: str
    generation: dict[str, Any]

    @property
    def timed(self) -> bool:
        return self.upscale not in SHIPPED

    @cached_property
    def key(self) -> str:
        base = SHIPPED.get(self.pipeline, self.pipeline)
        weights = [model_digest(resolve(base))]
        shipped = [name for name in (self.pipeline, self.upscale) if name in SHIPPED]
        weights += [model_digest(str(UPGRADES[SHIPPED[name]])) for name in shipped]
        sizes = (self.resolution, self.compare_at, self.upscale)
        return hash_values(self.pipeline, weights, sizes, self.generation, self.seed)


@dataclass(frozen=True, kw_only=True)
class PlannedJob(Job):
    """Commands that are printed and not run (docs/paper-scale.md)."""

    @property
    def key(self) -> str:
        return hash_values("planned", self.row, self.command)
