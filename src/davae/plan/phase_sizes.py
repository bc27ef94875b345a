"""Phases of an upgrade, and the sizes that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from torch import nn

from davae.cost.flops import count, meta_detail_vae
from davae.cost.memory import TrainingStep
from davae.data.shards.names import expand_braces
from davae.data.sources import open_source
from davae.dataset.opened import source_options
from davae.latent import LatentLayout
from davae.pretrained.shapes import BaseShapes
from davae.pretrained.text_encoders import TextEncoder
from davae.recipes.hardware import GIB, GPUS, UTILISATION, Gpu
from davae.recipes.sections import Data, Hardware, Optim
from davae.recipes.stages import POLISH
from davae.recipes.upgrade import Recipe
from davae.tasks.base_model import BaseModel
from davae.train.shares import Share

DEFAULT_GPU = "h100-80gb"  # assumed for a recipe without `hardware`
RESERVED = 2 * GIB  # of a GPU: CUDA's context, libraries' workspaces, fragmentation; an assumption
HOST_RUNTIME = 3 * GIB  # of a process: Python, torch, CUDA's libraries; an assumption
HOUR = 3600.0
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSUMED_IMAGES = 500_000  # where the data is not on this machine
TYPICAL_TOKENS = 100  # of a long caption, where a mask lets the cache leave the padding out


@dataclass(frozen=True)
class Phase:
    """Device memory, main memory, disk and time that one phase takes at its most.

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
class TextFacts:
    """Prompts of one model, zeros for a class-conditional one.

    Attributes:
        parameters: of all text encoders.
        flops: of embedding one prompt.
        working_values: values that embedding one prompt holds at a time.
        padded_values, stored_values: of one prompt's embeddings, at full length and as the cache writes them.
    """

    parameters: int = 0
    flops: float = 0.0
    working_values: int = 0
    padded_values: int = 0
    stored_values: int = 0


@dataclass(frozen=True)
class ImageFacts:
    """Number of training images, and whether they were counted or assumed."""

    count: int
    counted: bool


@dataclass(frozen=True)
class PhaseSizes:
    """Everything that the phases are computed from.

    Attributes:
        step1, step2: one process's training steps of stage 1 and stage 2.
        transformer, trained: parameters of the expanded transformer, and those that stage 2 trains.
        base_vae, detail_vae: parameters.
        encode_flops, decode_flops: of the detail VAE, one image.
        upgraded_flops, native_flops: of one transformer pass.
        share1, share2: images and passes of one process in a step of stage 1 and of stage 2.
        polish_step, polish_share: the same of `stage1.polish`, where the recipe has it.
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
    polish_step: TrainingStep | None = None
    polish_share: Share | None = None

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
        """Precision in which the run computes, encodes and draws."""
        return PRECISIONS[self.recipe.run.mixed_precision]

    @property
    def base_bytes(self) -> int:
        """Bytes of one frozen value of the base."""
        return 2 if self.recipe.base.dtype == "bfloat16" else 4

    @property
    def passes(self) -> int:
        """Transformer passes of one sampling step."""
        distilled = self.shapes.transformer_config.get("guidance_embeds")
        return 1 if distilled or self.recipe.sampling.guidance_scale <= 1 else 2

    def stage(self, name: str) -> tuple[Optim, Share, TrainingStep]:
        """Return a stage's settings, one process's share of a step, and its training step."""
        if name == POLISH:
            assert self.polish_share is not None
            assert self.polish_step is not None
            return self.recipe.stage1.polishing, self.polish_share, self.polish_step
        if name == "stage1":
            return self.recipe.stage1, self.share1, self.step1
        return self.recipe.stage2, self.share2, self.step2

    def seconds(self, flops: float, processes: int | None = None) -> float:
        """Return the time of FLOPs that are divided over processes.

        Args:
            flops: of all processes together.
            processes: by default all GPUs of the hardware.
        """
        return flops / (processes or self.hardware.count) / (UTILISATION * self.gpu.peak)

    @property
    def local(self) -> int:
        """Processes of one machine."""
        return min(self.hardware.count, self.hardware.a_machine)

    def image_bytes(self, pixels: int) -> int:
        """Return the bytes of a square float32 image."""
        return 3 * pixels**2 * 4

    @property
    def latent_bytes(self) -> int:
        """Bytes of one cached latent."""
        side = self.recipe.resolution // (self.shapes.vae_factor * self.layout.scale)
        return self.layout.channels * side**2 * (2 if self.recipe.cache.dtype == "float16" else 4)

    def text_device(self, prompts: int) -> int:
        """Return the bytes on the device while a batch of prompts is embedded."""
        return self.base_bytes * (self.text.parameters + prompts * self.text.working_values)

    @property
    def text_disk(self) -> int:
        """Bytes of the training set's prompt embeddings, with a caption of its own for each image."""
        width = 4 if self.recipe.cache.dtype == "float32" else 2
        return self.images.count * self.text.stored_values * width

    def meta_detail(self) -> Any:
        """Return a DetailVAE without weights."""
        return meta_detail_vae(self.shapes, self.layout.detail_channels, self.layout.scale)


# -- facts from configs and data -------------------------------------------------------------------------------------


def is_here(source: str) -> bool:
    """Return whether images are on this machine."""
    return source in ("openmoji", "openmoji-all") or any(map(glob, [escape(source), *expand_braces(source)]))


def count_images(data: Data, resolution: int, found: int | None = None) -> ImageFacts:
    """Return the number of training images, counted, limited by `data.limit`, or assumed.

    Args:
        data: the recipe's section; its held-out share is subtracted.
        resolution: pixels at which the images are read.
        found: images of the source, where it was opened already.
    """
    kept = 1.0 - data.holdout
    if found is not None or is_here(data.source):
        found = found or len(open_source(data.source, resolution, source_options(data)))
        return ImageFacts(max(1, round(kept * min(found, data.limit or found))), True)
    return ImageFacts(max(1, round(kept * data.limit)) if data.limit else ASSUMED_IMAGES, data.limit is not None)


def encoder_facts(encoder: TextEncoder) -> tuple[int, float, int]:
    """Return (parameters, FLOPs of a prompt, values that its pass holds) of a text encoder.

    A pass takes two FLOPs a parameter and token. It holds a layer's residual stream, queries, keys, values, its feed-forward
    and the scores of one attention layer.
    """
    module = encoder.on_meta()
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    hidden = max((m.in_features for m in linear if m.in_features == m.out_features), default=0) or 1024
    widest = max((m.out_features for m in linear if m.out_features <= 8 * hidden), default=hidden)  # no vocabulary
    heads = _heads(encoder.config)
    values = encoder.tokens * (6 * hidden + 3 * widest) + 2 * heads * encoder.tokens**2
    parameters = count(module.parameters())
    return parameters, 2.0 * parameters * encoder.tokens, values


def _heads(config: dict[str, Any]) -> int:
    """Return the attention heads of a transformers config, 32 where the name is unknown."""
    for entry in (config, config.get("text_config") or {}):
        for name in ("num_attention_heads", "num_heads"):
            if isinstance(entry.get(name), int):
                return int(entry[name])
    return 32


def short_prompt(base: BaseModel) -> int | None:
    """Return the tokens of a prompt where T5 is silent and gives one zero token, else None."""
    silent = base.text_encoders and Path(base.configs.model).is_dir() and base.silent_t5
    return base.text_encoders[0].tokens + 1 if silent else None


def text_facts(base: BaseModel) -> TextFacts:
    """Return facts on a model's prompts, zeros for classes and for a model that a recipe trains."""
    encoders, family = base.text_encoders, base.family
    if family.call is None or family.condition != "text" or not encoders:
        return TextFacts()
    found = [encoder_facts(encoder) for encoder in encoders]
    with torch.device("meta"):
        parts = [part.shape[1:] for part in family.call.blank(_Config(base.shapes.transformer_config))]
    masks = {shape[0] for shape in parts if len(shape) == 1}
    short = short_prompt(base)
    padded = stored = 0
    for shape in parts:
        length, width = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape[0])
        if short is not None and len(shape) > 1:
            length = short
        padded += length * width
        stored += width * (min(length, TYPICAL_TOKENS) if shape[0] in masks and len(shape) > 1 else length)
    return TextFacts(
        parameters=sum(entry[0] for entry in found),
        flops=sum(entry[1] for entry in found),
        working_values=max(entry[2] for entry in found),
        padded_values=padded,
        stored_values=stored,
    )


class _Config(dict[str, Any]):
    """A transformer's config as its call reads it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]
