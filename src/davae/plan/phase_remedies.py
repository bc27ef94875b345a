"""Changes that let a phase fit its hardware, and the cost of prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from davae.backbones.families import family_by_class
from davae.files.atomic import free_space
from davae.plan.phase_sizes import HOUR, Phase, PhaseSizes
from davae.recipes.hardware import GIB
from davae.recipes.stages import POLISH


def train_remedy(name: str) -> Callable[[PhaseSizes], str]:
    """Return a function that lists changes which make a training smaller, the cheapest first."""

    def remedy(sizes: PhaseSizes) -> str:
        recipe = sizes.recipe
        settings: Any = getattr(recipe, name)
        ways, step = [], sizes.stage(name)[2]
        embeds = name == "stage2" and recipe.cache.text == "step" and sizes.text.parameters > 0
        fixed = step.weights + step.optimizer + step.ema + (sizes.text_device(0) if embeds else 0)
        held = fixed <= sizes.budget  # smaller activations help only where the weights fit
        if name == "stage2" and settings.lora is not None and recipe.base.dtype == "float32":
            ways.append("set base.dtype=bfloat16")
        if embeds and _stores_text(sizes):
            ways.append(f"set cache.text=stored ({sizes.text_disk / GIB:,.1f} GiB of disk)")
        if held and not settings.gradient_checkpointing:
            ways.append(f"set {name}.gradient_checkpointing=true")
        if held and (sizes.share1 if name == "stage1" else sizes.share2).images > 1:
            ways.append(f"lower {name}.batch_size and raise {name}.accumulation")
        if held and name == "stage1" and recipe.stage1.crop is None:
            ways.append(f"set stage1.crop={recipe.resolution // 2}")
        if name == "stage2" and settings.lora is None:
            ways.append("start it with FSDP2, which divides weights and moments")
        return ", or ".join([*ways, "take a GPU with more memory"])

    return remedy


def _stores_text(sizes: PhaseSizes) -> bool:
    """Return whether the stated disk has room for the cache with all prompt embeddings."""
    recipe, disk = sizes.recipe, sizes.hardware.disk_gib
    needed = sizes.text_disk + sizes.images.count * recipe.cache.variants * sizes.latent_bytes
    return recipe.cache.shards is None and (disk is None or needed <= disk * GIB)


def half_remedy(sizes: PhaseSizes) -> str:
    if sizes.recipe.run.mixed_precision == "no":
        return "set run.mixed_precision=bf16, or take a GPU with more memory"
    return "take a GPU with more memory, or offload (`davae sample --offload model`)"


def cache_remedy(sizes: PhaseSizes) -> str:
    if sizes.text.parameters and sizes.base_bytes == 4:
        return "set base.dtype=bfloat16, or lower cache.batch_size"
    return "lower cache.batch_size, or take a GPU with more memory"


def disk_remedy(sizes: PhaseSizes) -> str:
    """Return changes that make the cache smaller, the largest part first."""
    cache = sizes.recipe.cache
    ways = []
    if cache.text == "stored" and sizes.text_disk:
        ways.append("set cache.text=step")
    if cache.variants > 1:
        ways.append("set cache.variants=1")
    if cache.dtype == "float32":
        ways.append("set cache.dtype=float16")
    return ", or ".join([*ways, "lower data.limit, or take more disk"])


def disk_notes(phases: list[Phase], folder: Path) -> list[str]:
    """Return a sentence if a run folder's disk has less room than a new run takes, else nothing.

    Args:
        phases: of the run.
        folder: of the run.
    """
    needed, free = sum(phase.disk for phase in phases), free_space(folder)
    if needed <= free:
        return []
    largest = max(phases, key=lambda phase: phase.disk)
    return [
        f"{folder}: the run takes {needed / GIB:,.1f} GiB of disk, {largest.disk / GIB:,.1f} of them for its {largest.name}, "
        f"and the disk has {free / GIB:,.1f} GiB left; free space, or choose another --out"
    ]


def polish_remedy(sizes: PhaseSizes) -> str:
    """Return changes that make the polish smaller and leave a finished stage 1 as it is."""
    ways = [f"lower {POLISH}.batch_size"] if sizes.stage(POLISH)[1].images > 1 else []
    half = sizes.recipe.resolution // 2
    if sizes.recipe.seen_pixels(POLISH) > half:
        ways.append(f"set {POLISH}.crop={half}")
    return ", or ".join([*ways, "take a GPU with more memory"])


REMEDIES: dict[str, Callable[[PhaseSizes], str]] = {
    "stage1": train_remedy("stage1"),
    POLISH: polish_remedy,
    "stage2": train_remedy("stage2"),
    "cache": cache_remedy,
    "export": half_remedy,
    "report": half_remedy,
    "sampling": half_remedy,
}


def check_phase(phase: Phase, sizes: PhaseSizes, before: int = 0) -> Phase:
    """Return a phase with `fits` and, where it does not fit, with the remedy.

    Args:
        before: bytes that the run folder holds when the phase begins.
    """
    hardware, remedies = sizes.hardware, []
    if phase.device > sizes.budget:
        remedies.append(REMEDIES[phase.name](sizes))
    if hardware.host_gib is not None and phase.machine > hardware.host_gib * GIB:
        remedies.append("start fewer processes a machine, or take one with more main memory")
    if hardware.disk_gib is not None and before + phase.disk > hardware.disk_gib * GIB:
        remedies.append(
            disk_remedy(sizes) if phase.name == "cache" else "lower run.keep_checkpoints, or take more disk"
        )
    return replace(phase, fits=not remedies, remedy="; ".join(remedies))


def text_notes(sizes: PhaseSizes) -> tuple[dict[str, Any], list[str]]:
    """Return figures and a sentence on the cost of prompt embeddings, stored and in the step."""
    text, recipe = sizes.text, sizes.recipe
    if not text.parameters or family_by_class(sizes.shapes.transformer_class).condition != "text":
        return {}, []
    width = 4 if recipe.cache.dtype == "float32" else 2
    prompts = recipe.stage2.batch_size * recipe.stage2.accumulation * recipe.stage2.max_steps
    figures = {
        "text_cache_padded_gib": round(sizes.images.count * text.padded_values * width / GIB, 3),
        "text_cache_gib": round(sizes.text_disk / GIB, 3),
        "text_cache_hours": round(sizes.seconds(text.flops * sizes.images.count) / HOUR, 4),
        "text_step_hours": round(sizes.seconds(text.flops * prompts) / HOUR, 4),
        "text_step_device_gib": round(sizes.text_device(sizes.share2.images) / GIB, 3),
    }
    cheaper = (
        "; embedding in every step takes less time than embedding all captions once"
        if figures["text_step_hours"] < figures["text_cache_hours"]
        else ""
    )
    note = (
        f"prompt embeddings: {recipe.cache.text}. Stored, they take {figures['text_cache_gib']:g} GiB of disk and "
        f"{figures['text_cache_hours']:g} hours; in the step (cache.text=step) no disk, {figures['text_step_hours']:g} hours "
        f"and {figures['text_step_device_gib']:g} GiB of each GPU{cheaper}"
    )
    return figures, [note]
