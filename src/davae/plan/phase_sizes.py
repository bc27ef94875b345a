"""Phases of an upgrade, and the sizes that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from davae.cost.flops import meta_detail_vae
from davae.cost.memory import TrainingStep
from davae.latent import LatentLayout
from davae.plan.phase_facts import ImageFacts, TextFacts
from davae.pretrained.open import BaseShapes
from davae.recipes.hardware import GIB, GPUS, UTILISATION, Gpu
from davae.recipes.schema import Recipe
from davae.recipes.sections import Hardware
from davae.train.shares import Share

DEFAULT_GPU = "h100-80gb"  # what a recipe without `hardware` is reckoned with
RESERVED = 2 * GIB  # of a GPU: CUDA's context, libraries' workspaces, fragmentation; an assumption
HOST_RUNTIME = 3 * GIB  # of a process: Python, torch, CUDA's libraries; an assumption
HOUR = 3600.0
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Phase:
    """What one phase takes at its most.

    Attributes:
        device: bytes on one GPU.
        host: bytes of main memory of one process, the one that takes most.
        machine: bytes of main memory of all processes of one machine.
        disk: bytes that the phase adds to the run folder, at its most.
        seconds: on the stated GPUs.
        batch: images at a time, where the plan chose their number; 0 elsewhere.
        fits: whether the GPU, and the machine where the recipe states it, have as much.
        remedy: what to change where it does not fit; "" where it does.
    """

    name: str
    device: int = 0
    host: int = 0
    machine: int = 0
    disk: int = 0
    seconds: float = 0.0
    batch: int = 0
    fits: bool = True
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the keys of the dry run's JSON."""
        return {
            "name": self.name,
            "device_gib": round(self.device / GIB, 3),
            "host_gib": round(self.host / GIB, 3),
            "machine_gib": round(self.machine / GIB, 3),
            "disk_gib": round(self.disk / GIB, 3),
            "hours": round(self.seconds / HOUR, 5),
            "batch_size": self.batch,
            "fits": self.fits,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Sizes:
    """Everything the phases are computed from.

    Attributes:
        transformer, trained: parameters of the expanded transformer, and those that stage 2 trains.
        base_vae, detail_vae: parameters.
        encode_flops, decode_flops: of the detail VAE, one image.
        upgraded_flops, native_flops: of one transformer pass.
        share1, share2: what one process does of a step.
    """

    recipe: Recipe
    shapes: BaseShapes
    layout: LatentLayout
    step1: TrainingStep
    step2: TrainingStep
    text: TextFacts
    images: ImageFacts
    transformer: int
    trained: int
    base_vae: int
    detail_vae: int
    encode_flops: float
    decode_flops: float
    upgraded_flops: float
    native_flops: float
    share1: Share
    share2: Share

    @property
    def hardware(self) -> Hardware:
        return self.recipe.hardware or Hardware(gpu=DEFAULT_GPU)

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.hardware.gpu]

    @property
    def budget(self) -> int:
        """Bytes of a GPU that a phase may fill."""
        return self.gpu.memory - RESERVED

    @property
    def precision(self) -> torch.dtype:
        """What the run computes in, and images are encoded and drawn in."""
        return PRECISIONS[self.recipe.run.mixed_precision]

    @property
    def base_bytes(self) -> int:
        """Of a frozen value of the base."""
        return 2 if self.recipe.base.dtype == "bfloat16" else 4

    @property
    def passes(self) -> int:
        """Transformer passes of one sampling step."""
        distilled = self.shapes.transformer_config.get("guidance_embeds")
        return 1 if distilled or self.recipe.sampling.guidance_scale <= 1 else 2

    def seconds(self, flops: float, processes: int | None = None) -> float:
        """Time of so many FLOPs divided over processes; over all that are stated by default."""
        return flops / (processes or self.hardware.count) / (UTILISATION * self.gpu.peak)

    @property
    def local(self) -> int:
        """Processes of one machine."""
        return min(self.hardware.count, self.hardware.a_machine)

    def image_bytes(self, pixels: int) -> int:
        return 3 * pixels**2 * 4

    @property
    def latent_bytes(self) -> int:
        """Of one cached latent."""
        side = self.recipe.resolution // (self.shapes.vae_factor * self.layout.scale)
        return self.layout.channels * side**2 * (2 if self.recipe.cache.dtype == "float16" else 4)

    def text_device(self, prompts: int) -> int:
        """Bytes on the device while so many prompts are embedded at a time."""
        return self.base_bytes * (self.text.parameters + prompts * self.text.working_values)

    @property
    def text_disk(self) -> int:
        """Bytes of the prompt embeddings of the training set, reckoned with a caption of its own for each image."""
        width = 4 if self.recipe.cache.dtype == "float32" else 2
        return self.images.count * self.text.stored_values * width

    def meta_detail(self) -> Any:
        return meta_detail_vae(self.shapes, self.layout.detail_channels, self.layout.scale)
