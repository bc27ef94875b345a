"""Images of an upgrade's two stages: one source, or one each."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from davae.data.conditions import check_conditions
from davae.data.images import ImageDataset
from davae.data.summary import Summary, TokenLimit
from davae.dataset.opened import SUMMARY, OpenedData, announce, bucket_notes, model_limits, open_pictures
from davae.recipes import Recipe
from davae.recipes.sections import Data
from davae.tasks.base_model import BaseModel


class StageData:
    """Images of stage 1 and stage 2, opened, summarised and logged on first use.

    Args:
        recipe: the upgrade's.
        base: its base model.
        out: run folder, which takes the summary and the sizes of the images.
    """

    def __init__(self, recipe: Recipe, base: BaseModel, out: Path):
        self.recipe, self.base, self.out = recipe, base, out
        self.shared = recipe.stage1_data == recipe.stage2_data
        self.reads_text = base.family.condition == "text"

    def _open(self, data: Data) -> OpenedData:
        return open_pictures(data, self.recipe.resolution, self.base.bucket_step(self.recipe.scale), folder=self.out)

    @cached_property
    def stage2(self) -> OpenedData:
        """Images of the latent cache and stage 2."""
        return self._open(self.recipe.stage2_data)

    @cached_property
    def stage1(self) -> OpenedData:
        """Images of stage 1: those of stage 2, unless `stage1.data` or `stage2.data` names others."""
        if self.shared:
            return self.stage2
        opened = self._open(self.recipe.stage1_data)
        opened.keep(self.out)
        notes = bucket_notes(opened, "stage1", self.recipe.stage1)
        announce(opened.summary((), notes), self.out / f"stage1-{SUMMARY}")
        return opened

    @cached_property
    def summary(self) -> Summary:
        """Summary of the images of stage 2, logged and written."""
        opened = self.stage2
        opened.keep(self.out)
        notes = bucket_notes(opened, "stage2", self.recipe.stage2, self.recipe.cache.variants)
        if self.shared:
            notes = bucket_notes(opened, "stage1", self.recipe.stage1) + notes
        found = opened.summary(self.token_limits(), notes)
        announce(found, self.out / SUMMARY)
        return found

    def token_limits(self) -> list[TokenLimit]:
        """Return the limits of the base's text encoders, none for a class-conditional model."""
        return model_limits(self.base) if self.reads_text else []

    def check_conditions(self) -> None:
        """Refuse captions or classes that stage 2 cannot learn from, before anything is trained.

        Raises:
            DataError: images without a class of the model; captions that are mostly empty or the same, where
                `data.require_captions` is on.
        """
        # `stage2.data` is opened here first
        check_conditions(self.summary, self.base.num_classes, self.recipe.stage2_data.require_captions)

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Images of stage 2 that cannot be used, and why, as far as they are known."""
        return dict(self.stage2.left_out)

    def for_stage1(self) -> ImageDataset:
        """Return the training set of stage 1, in its buckets."""
        pictures = self.stage1.pictures(self.stage1.data, self.recipe.run.seed)
        pictures.skipped = self.skipped if self.shared else dict(self.stage1.left_out)
        return pictures

    def for_cache(self) -> ImageDataset:
        """Return the training set of stage 2 as the cache encodes it, in its buckets."""
        pictures = self.stage2.pictures(self.stage2.data, self.recipe.run.seed).enumerating()
        pictures.skipped = self.skipped
        return pictures
