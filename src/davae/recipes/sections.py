"""Sections that recipes of every kind consist of, importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, ValidationInfo, field_validator

from davae.recipes.fields import Batch, NonNegativeInt, PositiveInt, SamplingSteps, Section, Seed
from davae.recipes.hardware import GPUS
from davae.recipes.images import Buckets, Data
from davae.recipes.stages import FlowOptim, Lora, Optim, Reconstruction, Stage1, Stage2

__all__ = [
    "Buckets",
    "Cache",
    "Data",
    "Export",
    "FlowOptim",
    "Hardware",
    "Lora",
    "Optim",
    "Reconstruction",
    "Report",
    "Run",
    "Sampling",
    "Section",
    "Stage1",
    "Stage2",
]


class Cache(Section):
    """The latent cache between the stages."""

    batch_size: Batch = Field(default=16, description="Images encoded at a time, at most.")
    variants: Batch = Field(default=1, description="Augmented draws (crop, flip, background, caption) of an image.")
    dtype: Literal["float32", "float16"] = Field(default="float16", description="Precision of the cached latents.")
    shards: str | None = Field(
        default=None, description="LightningDiT's latent shards to train on, instead of encoding images."
    )
    text: Literal["stored", "step"] = Field(
        default="stored", description="Prompt embeddings: `stored` on disk once, or computed again in every `step`."
    )


class Sampling(Section):
    steps: SamplingSteps = Field(default=30, description="Sampling steps of the report and of progress images.")
    guidance_scale: NonNegativeFloat = Field(default=2.5, description="Guidance scale of the same.")
    prompts: tuple[str, ...] = Field(
        default=(), description="Prompts of the same. Without them: captions of training images."
    )
    seed: Seed = Field(default=0, description="Seed of their noise.")


class Report(Section):
    holdout_pictures: PositiveInt = Field(default=64, description="Images in the reconstruction table.")
    timing_repeats: PositiveInt = Field(default=5, description="Repeats of each timing; the median counts.")
    batch_size: PositiveInt | None = Field(
        default=None,
        description="Images at a time in report and validation. Without it: what the memory plan allows.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="Precision of the report's images. Without it: the run's. May change on a run that exists.",
    )


class Export(Section):
    """The run's `pipeline/`."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of the run's pipeline/."
    )
    timing_repeats: SamplingSteps = Field(default=5, description="Unused; report.timing_repeats counts.")


class Run(Section):
    seed: Seed = Field(default=0, description="Seed of everything that has none of its own.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Precision of the computation.")
    log_every: PositiveInt = Field(default=10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: PositiveInt = Field(default=500, description="Steps between checkpoints.")
    keep_checkpoints: PositiveInt = Field(
        default=2, description="Newest checkpoints that are kept; the best validated one is kept as well."
    )
    keep_every: NonNegativeInt = Field(
        default=0, description="Steps between checkpoints that are never dropped; 0 for none."
    )
    sample_every: NonNegativeInt = Field(default=0, description="Steps between grids in progress/; 0 for never.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="Experiment trackers to log to."
    )
    stop_signals: tuple[Literal["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"], ...] = Field(
        default=("SIGINT", "SIGTERM", "SIGUSR1"), description="Signals at which a run saves and stops."
    )
    ema_device: Literal["model", "cpu"] = Field(
        default="model", description="Where the average of the weights is kept. `cpu` saves memory of the GPU."
    )
    compile: Literal["off", "blocks"] = Field(
        default="off", description="`blocks` compiles each repeated block with torch.compile."
    )
    find_unused_parameters: bool = Field(default=False, description="DDP: for models that leave weights unused.")

    @field_validator("mixed_precision", "compile", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads an unquoted no or off as false."""
        return {"mixed_precision": "no", "compile": "off"}[str(info.field_name)] if value is False else value


class Hardware(Section):
    """GPUs that a recipe was written for, with which a dry run reckons, unlike training."""

    gpu: str = Field(description="Name of the GPU.")
    count: Batch = Field(default=1, description="Processes; each takes its share of the batch.")
    a_machine: PositiveInt = Field(default=8, description="GPUs of one machine.")
    host_gib: PositiveInt | None = Field(
        default=None, description="Main memory of one machine in GiB. Without it: not checked."
    )
    disk_gib: PositiveInt | None = Field(
        default=None, description="Space for the run folder in GiB. Without it: not checked."
    )

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"use one of {', '.join(GPUS)}")
        return gpu
