"""Dry run: shapes, tokens, parameters, FLOPs, memory and time of a run, from configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from davae.cost.flops import autoencoder_flops
from davae.cost.memory import polish_memory, stage1_memory, stage2_memory
from davae.data.conditions import check_conditions
from davae.dataset.opened import open_pictures
from davae.plan.figures import MetaUpgrade, TokenPlan
from davae.plan.phase_remedies import REMEDIES, disk_notes, text_notes
from davae.plan.phase_sizes import Phase, PhaseSizes, count_images, is_here, text_facts
from davae.plan.phases import plan_phases
from davae.pretrained.offline import readable
from davae.recipes.hardware import GIB, GPUS, UTILISATION
from davae.recipes.sections import Hardware, Optim
from davae.recipes.stages import POLISH
from davae.recipes.upgrade import Recipe
from davae.runs.cache import check_shards
from davae.runs.checks import check_distilled, check_init, check_objective, check_recipe, check_shared, taken_from
from davae.runs.validation import plain_images
from davae.tasks.base_model import BaseModel, with_known_base
from davae.train.run_folder import is_done
from davae.train.shares import Share, share_of_step
from davae.zoo import resolve

DAY = 86400
LOOKED_AT = 5_000  # images of a source, spread over it
Stage = TypeVar("Stage", bound=Optim)


@dataclass(frozen=True)
class Plan:
    """Result of a dry run: figures by name, the phases, and notes.

    Attributes:
        hardware: assumed for the phases.
    """

    figures: dict[str, Any]
    notes: list[str]
    phases: list[Phase] = field(default_factory=list)
    hardware: Hardware | None = None

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


def plan(recipe: Recipe, folder: Path | None = None, verb: str = "upgrade", stage1: Path | None = None) -> Plan:
    """Return the figures of a dry run from configs alone, and check the data that is here.

    A hub model that cannot be reached is read from its preset.

    Args:
        recipe: of the run.
        folder: of the run, whose free disk is compared with the disk that the run takes.
        verb: of the run.
        stage1: folder of another run, whose DetailVAE serves; that of an earlier command unless given.
    """
    if stage1 := stage1 or (folder and taken_from(folder, recipe.base.train is not None)):
        check_shared(recipe, stage1)
    recipe, missing = with_known_base(recipe)
    model, note = (None, "") if recipe.base.model is None else readable(resolve(recipe.base.model))
    base = BaseModel.of(recipe, configs=model)
    shapes, layout = base.shapes, check_recipe(recipe, base)
    check_init(recipe, shapes)
    objective = check_objective(recipe, base)
    images = check_data(recipe, base, verb != "train-vae" and not (folder and is_done(folder, recipe, "cache")))
    upgrade = MetaUpgrade(shapes, layout, recipe.stage2.detail_offset)
    tokens = upgrade.tokens(recipe.resolution)
    sizes = recipe_sizes(recipe, upgrade, tokens, base, images)
    phases = plan_phases(sizes)
    side = recipe.base.resolution // shapes.vae_factor
    figures: dict[str, Any] = {
        "image": f"{recipe.resolution}x{recipe.resolution}, base {recipe.base.resolution}x{recipe.base.resolution}",
        "latents": f"z ({layout.base_channels},{side},{side}) + z_d ({layout.detail_channels},{side},{side})",
        "patch": f"{shapes.patch_size}, head {base.family.head_order}",
        "objective": objective.prediction,
        "tokens_upgraded": tokens.upgraded_tokens,
        "tokens_native": tokens.native_tokens,
        "transformer_gflops_upgraded": round(tokens.upgraded_flops / 1e9, 3),
        "transformer_gflops_native": round(tokens.native_flops / 1e9, 3),
        "speedup_bound": round(tokens.bound, 2),
        "stage1_parameters": sizes.detail_vae,
        "stage1_trainable_parameters": upgrade.detail_vae.num_parameters(only_trainable=True),
        "stage2_parameters": sizes.transformer,
        "stage2_trainable_parameters": sizes.trained,
    }
    for name in recipe.trainings:
        device = next(phase.device for phase in phases if phase.name == name)
        figures |= training_figures(name, sizes, device)
        figures |= {} if recipe.hardware is None else on_hardware(name, sizes, device)
    text_figures, text_note = text_notes(sizes)
    known = check_distilled(recipe, base)
    notes = [line for line in (missing or note, known and known.note(recipe.base.name)) if line]
    notes += [*step_notes(recipe), *text_note, *assumption_notes(sizes)]
    notes += [] if folder is None else disk_notes(phases, folder)
    return Plan(figures | text_figures, notes, phases, sizes.hardware)


def check_data(recipe: Recipe, base: BaseModel, reads: bool) -> int | None:
    """Check data that is here as the run does, and return the images of stage 2 where opened.

    Args:
        recipe, base: of the run.
        reads: whether the run is to read captions, classes or latent shards.
    """
    train, scale, shows, found = recipe.base.train, recipe.scale, recipe.run.sample_every, None
    if reads and recipe.cache.shards is not None and Path(recipe.cache.shards).exists():
        side, channels = recipe.base.resolution // base.shapes.vae_factor, base.shapes.channels
        check_shards(recipe.cache, channels + recipe.detail_channels, side, base.num_classes)
    own = [] if recipe.stage1_data == recipe.stage2_data else [(recipe.stage1_data, scale, False, shows)]
    second = recipe.stage2_data, scale, reads and recipe.cache.shards is None, shows or recipe.stage2.validate_every
    parts = [*own, second] if reads or not own else own
    parts += [] if train is None else [(train.data, 1, train.cache.shards is None, 0)]
    for data, times, conditions, shown in parts:
        if not is_here(data.source):
            continue
        few = data.model_copy(update={"limit": min(data.limit or LOOKED_AT, LOOKED_AT)})
        opened = open_pictures(few, recipe.base.resolution * times, base.bucket_step(times))
        found = len(opened.source) if data == recipe.stage2_data and not data.streaming else found
        if conditions:
            check_conditions(opened.summary((), examples=0), base.num_classes, data.require_captions)
        if shown:
            plain_images(opened, 1, recipe.resolution, recipe.run.seed)
    return found


def recipe_sizes(
    recipe: Recipe, upgrade: MetaUpgrade, tokens: TokenPlan, base: BaseModel, images: int | None
) -> PhaseSizes:
    """Return the sizes that phases are computed from, with images of stage 2 given or counted."""
    shapes, layout = upgrade.shapes, upgrade.layout
    processes = 1 if recipe.hardware is None else recipe.hardware.count
    shares = {
        name: share_of_step(settings, name, processes, recipe.hardware) for name, settings in recipe.trainings.items()
    }
    own1, own2 = own_settings(recipe.stage1, shares["stage1"]), own_settings(recipe.stage2, shares["stage2"])
    mixed, base_dtype = recipe.run.mixed_precision != "no", getattr(torch, recipe.base.dtype)
    frozen = torch.float32 if recipe.stage2.lora is None else base_dtype
    side = recipe.base.resolution // shapes.vae_factor
    encode, decode = autoencoder_flops(upgrade.detail_vae, recipe.resolution)
    layers = shapes, recipe.detail_channels, recipe.scale
    autoencoder, polish = (*layers, recipe.seen_pixels("stage1")), None
    if recipe.stage1.polish is not None:
        seen = recipe.seen_pixels(POLISH)
        polish = polish_memory(*layers, seen, own_settings(recipe.stage1.polishing, shares[POLISH]), mixed=mixed)
    return PhaseSizes(
        recipe=recipe,
        shapes=shapes,
        layout=layout,
        step1=stage1_memory(*autoencoder, own1, mixed=mixed, frozen=base_dtype),
        step2=stage2_memory(shapes, layout, side, own2, mixed=mixed, frozen=frozen),
        text=text_facts(base),
        images=count_images(recipe.stage2_data, recipe.resolution, images),
        transformer=upgrade.expanded.num_parameters(),
        trained=upgrade.trained(recipe.stage2.lora),
        base_vae=upgrade.base_vae.num_parameters(),
        detail_vae=upgrade.detail_vae.num_parameters(),
        encode_flops=encode.total,
        decode_flops=decode.total,
        upgraded_flops=tokens.upgraded_flops,
        native_flops=tokens.native_flops,
        share1=shares["stage1"],
        share2=shares["stage2"],
        polish_step=polish,
        polish_share=shares.get(POLISH),
    )


def own_settings(settings: Stage, share: Share) -> Stage:
    """Return a stage's settings with one process's share of the batch."""
    return settings.model_copy(update={"batch_size": share.images, "accumulation": share.passes})


def assumption_notes(sizes: PhaseSizes) -> list[str]:
    """Return sentences on the figures that rest on an assumption."""
    recipe, notes = sizes.recipe, []
    if not sizes.images.counted:
        notes.append(
            f"{sizes.images.count:,} images assumed, as {recipe.stage2_data.source} is not here (data.limit sets them)"
        )
    if recipe.hardware is not None:
        notes.append(
            f"days: at {UTILISATION:.0%} of the peak of {recipe.hardware.count} x {recipe.hardware.gpu}, an assumption; "
            "caching, loading and evaluation come on top, and CUDA's own memory on the memory"
        )
    return notes


def step_notes(recipe: Recipe) -> list[str]:
    """Return sentences on settings of a recipe whose names are easily confused."""
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


def training_figures(name: str, sizes: PhaseSizes, device: int) -> dict[str, Any]:
    """Return the memory of one process, its part in the step, and the work of the whole stage.

    Args:
        name: of the training.
        device: bytes of the phase on one GPU, as in the table of phases.
    """
    settings, share, step = sizes.stage(name)
    gib = {key: round(value / GIB, 3) for key, value in step.as_dict().items()}
    peak, stage = gib.pop("peak"), name.replace(".", "_")
    return {
        **{f"{stage}_{key}_gib": value for key, value in gib.items()},
        f"{stage}_step_peak_gib": peak,
        f"{stage}_rest_of_pipeline_gib": round(max(0, device - step.peak) / GIB, 3),
        f"{stage}_memory_gib": round(device / GIB, 3),
        f"{stage}_petaflops": round(step.flops * share.passes * settings.max_steps / 1e15, 3),
    }


def on_hardware(name: str, sizes: PhaseSizes, device: int) -> dict[str, Any]:
    """Return whether a stage of `device` bytes fits the stated GPUs and how long it takes."""
    hardware, gpu = sizes.hardware, sizes.gpu
    settings, share, step = sizes.stage(name)
    fits = f"{hardware.gpu} ({gpu.memory / GIB:.0f} GiB)"
    fits = f"does not fit {fits}: {REMEDIES[name](sizes)}" if device > sizes.budget else f"fits {fits}"
    seconds = step.flops * share.passes * settings.max_steps / (UTILISATION * gpu.peak)
    stage = name.replace(".", "_")
    return {
        f"{stage}_fits": fits,
        f"{stage}_pictures_a_step": settings.batch_size * settings.accumulation,
        f"{stage}_days": round(seconds / DAY, 3),
    }
