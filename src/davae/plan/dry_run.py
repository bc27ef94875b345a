"""What a run would do, worked out from configs: shapes, tokens, parameters, FLOPs, memory, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from davae.backbones.expand import expand_transformer
from davae.backbones.families import family_by_class
from davae.backbones.trainable import choose_trainable
from davae.cost.flops import (
    autoencoder_flops,
    count,
    meta_autoencoder,
    meta_detail_vae,
    meta_transformer,
    transformer_flops,
)
from davae.cost.memory import TrainingStep, stage1_memory, stage2_memory
from davae.plan.phase_facts import TextFacts, count_images, text_facts
from davae.plan.phase_remedies import REMEDIES, disk_notes, text_notes
from davae.plan.phase_sizes import Phase, Sizes
from davae.plan.phases import plan_phases
from davae.pretrained.offline import readable
from davae.pretrained.open import BaseShapes, read_shapes
from davae.pretrained.text_encoders import text_encoders
from davae.recipes import load_recipe, shipped_recipes
from davae.recipes.hardware import GIB, GPUS, UTILISATION
from davae.recipes.schema import BaseRecipe, Recipe
from davae.recipes.sections import Hardware, Optim
from davae.runs.checks import base_objective, check_distilled, check_init, check_recipe
from davae.tasks.autoencoder import build_autoencoder
from davae.tasks.base_model import base_shapes, new_transformer
from davae.train.shares import share_of_step
from davae.vae.codec import Codec
from davae.zoo import resolve
from davae.zoo.presets import presets

DAY = 86400


@dataclass(frozen=True)
class TokenPlan:
    """One square picture: what a native and an upgraded transformer have to do."""

    resolution: int
    native_tokens: int
    upgraded_tokens: int
    native_flops: float  # one transformer pass, text included
    upgraded_flops: float

    @property
    def bound(self) -> float:
        """Upper bound of the transformer's speed-up."""
        return self.native_flops / self.upgraded_flops

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "bound": self.bound}


def check_resolution(shapes: BaseShapes, resolution: int, scale: int) -> None:
    """ValueError when a picture of that size does not divide into tokens, with the nearest sizes that do."""
    step = shapes.vae_factor * shapes.patch_size * scale
    if resolution % step or resolution < step:
        below = resolution // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise ValueError(
            f"resolution {resolution} is not divisible by {step} (autoencoder factor {shapes.vae_factor} x patch "
            f"{shapes.patch_size} x scale {scale}); use {nearest}"
        )


def token_plan(shapes: BaseShapes, resolution: int, scale: int, detail_channels: int | None = None) -> TokenPlan:
    """Native against upgraded at `resolution` pixels; D is C where it is not given.

    Raises:
        ValueError: when the resolution does not divide into tokens.
    """
    check_resolution(shapes, resolution, scale)
    native = (resolution // (shapes.vae_factor * shapes.patch_size)) ** 2
    side = resolution // shapes.vae_factor
    with torch.device("meta"):
        base = meta_transformer(shapes)
        wide = expand_transformer(base, detail_channels or shapes.channels)
    flops = [transformer_flops(base, side).total, transformer_flops(wide, side // scale).total]
    return TokenPlan(resolution, native, native // scale**2, *flops)


H100_FLOPS = UTILISATION * GPUS["h100-80gb"].peak


def gpu_days(recipe: Recipe, flops: tuple[float, float]) -> float:
    """H100-days of both stages at 40 % of its bf16 peak; a backward pass counts twice a forward one.

    Encoding the cache, losses' own networks, loading and evaluation come on top.

    Args:
        flops: `stage_flops` of the recipe's base model and sizes.
    """
    return training_days(recipe.stage1, flops[0]) + training_days(recipe.stage2, flops[1])


def stage_flops(
    shapes: BaseShapes, resolution: int, scale: int, detail_channels: int, stage1_pixels: int
) -> tuple[float, float]:
    """FLOPs of a picture's forward pass in stage 1, which may see a part of it, and in stage 2; `resolution` is I_hr's."""
    vae = meta_detail_vae(shapes, detail_channels, scale)
    tokens = token_plan(shapes, resolution, scale, detail_channels)
    return sum(flops.total for flops in autoencoder_flops(vae, stage1_pixels)), tokens.upgraded_flops


def training_days(settings: Optim, flops: float) -> float:
    """H100-days of a training whose forward pass takes so many FLOPs a picture."""
    return 3 * flops * settings.batch_size * settings.accumulation * settings.max_steps / H100_FLOPS / DAY


def base_gpu_days(recipe: BaseRecipe, latents: tuple[int, int] | None = None) -> float:
    """The same of a base recipe: its transformer, and its autoencoder where it trains one.

    Args:
        latents: (pixels per position, channels) of a pretrained autoencoder.
    """
    days = 0.0
    if not isinstance(recipe.autoencoder, str):
        with torch.device("meta"):
            vae = build_autoencoder(recipe)
        codec = Codec(vae)
        latents = codec.factor, codec.channels
        assert recipe.vae is not None
        days = training_days(recipe.vae, sum(flops.total for flops in autoencoder_flops(vae, recipe.resolution)))
    assert latents is not None
    factor, channels = latents
    side = recipe.resolution // factor
    with torch.device("meta"):
        transformer = new_transformer(recipe, channels, side)
    return days + training_days(recipe.dit, transformer_flops(transformer, side).total)


@dataclass(frozen=True)
class Plan:
    """What a dry run shows: figures by name, the phases, and sentences."""

    figures: dict[str, Any]
    notes: list[str]
    phases: list[Phase] = field(default_factory=list)
    hardware: Hardware | None = None  # what the phases are reckoned with

    def as_dict(self) -> dict[str, Any]:
        """Return the dry run's JSON."""
        assert self.hardware is not None
        return {
            "gpu": self.hardware.gpu,
            "gpus": self.hardware.count,
            "gpu_gib": round(GPUS[self.hardware.gpu].memory / GIB, 1),
            "phases": [phase.as_dict() for phase in self.phases],
            **self.figures,
            "notes": self.notes,
        }


def plan(recipe: Recipe, folder: Path | None = None) -> Plan:
    """Figures of a dry run, from configs alone; those of a hub model that cannot be reached come from its preset.

    Args:
        folder: of the run, whose disk is compared with what the run takes.
    """
    recipe, missing = with_known_base(recipe)
    model, note = (None, "") if recipe.base.model is None else readable(resolve(recipe.base.model))
    note = missing or note
    shapes = base_shapes(recipe) if model is None else read_shapes(model)
    layout = check_recipe(recipe, shapes, model)
    check_init(recipe, shapes)
    vae = meta_detail_vae(shapes, recipe.detail_channels, recipe.scale)
    with torch.device("meta"):
        transformer = expand_transformer(meta_transformer(shapes), recipe.detail_channels)
        whole = count(transformer.parameters())
        trained_dit = count(choose_trainable(transformer, recipe.stage2.lora))
    tokens = token_plan(shapes, recipe.resolution, recipe.scale, recipe.detail_channels)
    side = recipe.base.resolution // shapes.vae_factor
    mixed = recipe.run.mixed_precision != "no"
    processes = 1 if recipe.hardware is None else recipe.hardware.count
    share1, share2 = (
        share_of_step(settings, name, processes, recipe.hardware)
        for name, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2))
    )
    own1 = recipe.stage1.model_copy(update={"batch_size": share1.images, "accumulation": share1.passes})
    own2 = recipe.stage2.model_copy(update={"batch_size": share2.images, "accumulation": share2.passes})
    frozen = torch.float32 if recipe.stage2.lora is None else getattr(torch, recipe.base.dtype)
    first = stage1_memory(shapes, recipe.detail_channels, recipe.scale, recipe.stage1_pixels, own1, mixed=mixed)
    second = stage2_memory(shapes, layout, side, own2, mixed=mixed, frozen=frozen)
    text = TextFacts()
    if model is not None:
        text = text_facts(model, shapes, text_encoders(model, shapes.transformer_config))
    base_vae = count(meta_autoencoder(shapes).parameters())
    figures: dict[str, Any] = {
        "image": f"{recipe.resolution}x{recipe.resolution}, base {recipe.base.resolution}x{recipe.base.resolution}",
        "latents": f"z ({layout.base_channels},{side},{side}) + z_d ({layout.detail_channels},{side},{side})",
        "patch": f"{shapes.patch_size}, head {family_by_class(shapes.transformer_class).head_order}",
        "objective": base_objective(recipe, shapes, model).prediction,
        "tokens_upgraded": tokens.upgraded_tokens,
        "tokens_native": tokens.native_tokens,
        "transformer_gflops_upgraded": round(tokens.upgraded_flops / 1e9, 3),
        "transformer_gflops_native": round(tokens.native_flops / 1e9, 3),
        "speedup_bound": round(tokens.bound, 2),
        "stage1_parameters": count(vae.parameters()),
        "stage1_trainable_parameters": count(p for p in vae.parameters() if p.requires_grad),
        "stage2_parameters": whole,
        "stage2_trainable_parameters": trained_dit,
    }
    notes = [note] if note else []
    known = check_distilled(recipe, model)
    notes += [] if known is None else [known.note(recipe.base.name)]
    encode, decode = autoencoder_flops(
        meta_detail_vae(shapes, recipe.detail_channels, recipe.scale), recipe.resolution
    )
    sizes = Sizes(
        recipe=recipe,
        shapes=shapes,
        layout=layout,
        step1=first,
        step2=second,
        text=text,
        images=count_images(recipe.stage2_data, recipe.resolution),
        transformer=whole,
        trained=trained_dit,
        base_vae=base_vae,
        detail_vae=count(vae.parameters()),
        encode_flops=encode.total,
        decode_flops=decode.total,
        upgraded_flops=tokens.upgraded_flops,
        native_flops=tokens.native_flops,
        share1=share1,
        share2=share2,
    )
    phases = plan_phases(sizes)
    device = {phase.name: phase.device for phase in phases}
    for name, own, step in (("stage1", own1, first), ("stage2", own2, second)):
        figures |= stage_figures(name, own, step, device[name])
        if recipe.hardware is not None:
            figures |= on_hardware(name, own, step, device[name], sizes)
    notes += step_notes(recipe)
    text_figures, text_note = text_notes(sizes)
    notes += text_note
    if not sizes.images.counted:
        notes.append(
            f"{sizes.images.count:,} images assumed, as {recipe.stage2_data.source} is not here (data.limit sets them)"
        )
    if recipe.hardware is not None:
        notes.append(
            f"days: at {UTILISATION:.0%} of the peak of {recipe.hardware.count} x {recipe.hardware.gpu}, an assumption; "
            "caching, loading and evaluation come on top, and CUDA's own memory on the memory"
        )
    notes += [] if folder is None else disk_notes(phases, folder)
    return Plan(figures | text_figures, notes, phases, sizes.hardware)


def step_notes(recipe: Recipe) -> list[str]:
    """Return sentences on settings whose names are easily confused, where a recipe sets them."""
    notes = []
    for name, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if settings.accumulation > 1:
            images = settings.batch_size * settings.accumulation
            notes.append(
                f"{name}.accumulation: {settings.accumulation} batches of {settings.batch_size} make one optimizer step of "
                f"{images:,} images; max_steps counts these steps, and each takes {settings.accumulation} times as long"
            )
        if settings.lr_warmup_steps:
            notes.append(
                f"{name}.lr_warmup_steps: the learning rate rises over the first {settings.lr_warmup_steps:,} steps"
            )
    if fade := recipe.stage2.warmup_steps:
        notes.append(
            f"stage2.warmup_steps: N_warm of Eq. 12, the loss of the detail channels fades in over {fade:,} steps; the "
            "learning rate has a warm-up of its own, lr_warmup_steps"
        )
    return notes


def with_known_base(recipe: Recipe) -> tuple[Recipe, str]:
    """Return a recipe whose base can be read from configs, and a sentence where another place is read than it names.

    A folder that is still to be made is read from what makes it: `runs/NAME/pipeline` from the shipped base recipe NAME,
    `models/NAME` from the preset NAME.
    """
    model = recipe.base.model
    if model is None or Path(model).exists() or len(parts := Path(model).parts) < 2:
        return recipe, ""
    shipped = load_recipe(parts[-2]) if parts[-1] == "pipeline" and parts[-2] in shipped_recipes() else None
    if isinstance(shipped, BaseRecipe):
        base = recipe.base.model_copy(update={"model": None, "train": shipped})
        return recipe.model_copy(update={"base": base}), f"{model} is not here: read from the recipe {shipped.name}"
    if parts[0] == "models" and parts[-1] in presets():
        base = recipe.base.model_copy(update={"model": parts[-1]})
        return recipe.model_copy(update={"base": base}), f"{model} is not here: read from the preset {parts[-1]}"
    return recipe, ""


def stage_figures(name: str, settings: Optim, step: TrainingStep, device: int) -> dict[str, Any]:
    """Return the memory of one process, of which the step is a part, and the work of the whole stage.

    Args:
        device: bytes of the phase on one GPU, as in the table of phases.
    """
    gib = {key: round(value / GIB, 3) for key, value in step.as_dict().items()}
    peak = gib.pop("peak")
    return {
        **{f"{name}_{key}_gib": value for key, value in gib.items()},
        f"{name}_step_peak_gib": peak,
        f"{name}_rest_of_pipeline_gib": round(max(0, device - step.peak) / GIB, 3),
        f"{name}_memory_gib": round(device / GIB, 3),
        f"{name}_petaflops": round(step.flops * settings.accumulation * settings.max_steps / 1e15, 3),
    }


def on_hardware(name: str, own: Optim, step: TrainingStep, device: int, sizes: Sizes) -> dict[str, Any]:
    """Return whether the stage fits the stated GPUs, as the table of phases has it, and how long it takes.

    Args:
        own: the stage's settings with one process's share of the batch.
        device: bytes of the phase on one GPU.
    """
    hardware, gpu = sizes.hardware, sizes.gpu
    stage: Optim = getattr(sizes.recipe, name)
    fits = f"{hardware.gpu} ({gpu.memory / GIB:.0f} GiB)"
    fits = f"does not fit {fits}: {REMEDIES[name](sizes)}" if device > sizes.budget else f"fits {fits}"
    seconds = step.flops * own.accumulation * stage.max_steps / (UTILISATION * gpu.peak)
    return {
        f"{name}_fits": fits,
        f"{name}_pictures_a_step": stage.batch_size * stage.accumulation,
        f"{name}_days": round(seconds / DAY, 3),
    }
