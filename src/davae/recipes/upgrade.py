"""Recipes of upgrades."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, model_validator

from davae.recipes.base import BaseRecipe
from davae.recipes.fields import Pixels, RecipeName, Scale, Section, Width
from davae.recipes.sections import Cache, Data, Export, Hardware, Report, Run, Sampling, Stage1, Stage2
from davae.recipes.stages import POLISH, Optim


class Base(Section):
    """The pretrained model, or the recipe to train one first."""

    model: str | None = Field(
        default=None, description="A diffusers folder, a hub id or `ID@REVISION`, or `micro`, the embedded one."
    )
    train: BaseRecipe | None = Field(
        default=None, description="Recipe of a base to train first, into the run folder."
    )
    resolution: Pixels = Field(description="Side in pixels of the base image I, whose token count is kept.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of frozen weights: the transformer under LoRA, text encoders."
    )
    distilled: Literal["refuse", "train"] = Field(
        default="refuse",
        description="`train` accepts a model that was distilled to a few steps; training undoes the distillation.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Base:
        if (self.model is None) == (self.train is None):
            raise ValueError("give either model, a pretrained one, or train, the recipe of one to train first")
        if self.train is not None and self.train.resolution != self.resolution:
            raise ValueError(f"resolution is {self.resolution}, base.train.resolution {self.train.resolution}")
        return self

    @property
    def name(self) -> str:
        """Name of the base model."""
        return self.model if self.model is not None else cast(BaseRecipe, self.train).name


class Recipe(Section):
    """Upgrade a pretrained model: `davae upgrade`."""

    kind: Literal["upgrade"] = Field(default="upgrade", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    base: Base = Field(description="The pretrained model.")
    scale: Scale = Field(default=2, description="s: how many times the side grows, at the same token count.")
    detail_channels: Width = Field(description="D: channels of the detail latent, a multiple of the base's.")
    init: str | None = Field(
        default=None, description="An upgrade to go on from, as `davae export` writes it, or `micro-upgraded`."
    )
    downsample: Literal["antialias", "bicubic"] = Field(
        default="antialias",
        description="Filter that makes the base image. `bicubic` is the authors', without antialiasing.",
    )
    data: Data = Field(default=Data(), description="Images of both stages.")
    stage1: Stage1 = Field(description="The detail-aligned VAE.")
    cache: Cache = Field(default=Cache(), description="Latent cache between the stages.")
    stage2: Stage2 = Field(description="The warm-started transformer.")
    sampling: Sampling = Field(default=Sampling(), description="Images that the run draws.")
    report: Report = Field(default=Report(), description="The report.")
    export: Export = Field(default=Export(), description="The exported pipeline.")
    run: Run = Field(default=Run(), description="Settings of the whole run.")
    hardware: Hardware | None = Field(
        default=None, description="GPUs that a dry run plans for. Training takes those that it finds."
    )

    @model_validator(mode="before")
    @classmethod
    def _same_images(cls, values: Any) -> Any:
        """Give a base that is trained first the upgrade's images, unless it names its own."""
        train = values.get("base", {}).get("train") if isinstance(values.get("base"), dict) else None
        if isinstance(train, dict) and "data" not in train and "data" in values:
            values = {**values, "base": {**values["base"], "train": {**train, "data": values["data"]}}}
        return values

    @model_validator(mode="after")
    def _half_base_computes_in_half(self) -> Recipe:
        if self.base.dtype == "bfloat16" and self.run.mixed_precision != "bf16":
            raise ValueError(
                f"base.dtype is bfloat16 and run.mixed_precision {self.run.mixed_precision}; set run.mixed_precision to bf16"
            )
        return self

    @model_validator(mode="after")
    def _discriminators_fit(self) -> Recipe:
        for name, settings in self.trainings.items():
            if isinstance(settings, Stage1):
                settings.check_discriminator(name, self.seen_pixels(name))
        return self

    @property
    def resolution(self) -> int:
        """Pixels of I_hr."""
        return self.base.resolution * self.scale

    @property
    def trainings(self) -> dict[str, Optim]:
        """Settings of each training by its path in the recipe, in order."""
        polish: dict[str, Optim] = {} if self.stage1.polish is None else {POLISH: self.stage1.polishing}
        return {"stage1": self.stage1, **polish, "stage2": self.stage2}

    @property
    def stage1_data(self) -> Data:
        """Images of stage 1."""
        return self.stage1.data or self.data

    @property
    def stage2_data(self) -> Data:
        """Images of the latent cache and stage 2."""
        return self.stage2.data or self.data

    def seen_pixels(self, training: str) -> int:
        """Return the side of the square that a step of stage 1, or of its polish, sees."""
        settings = self.stage1.polishing if training == POLISH else self.stage1
        return min(self.resolution, settings.crop or self.resolution)
