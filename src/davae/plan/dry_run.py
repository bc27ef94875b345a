"""Dry run: shapes, tokens, parameters, FLOPs, memory and time of a run, from configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from davae.cost.flops import autoencoder_flops
from davae.cost.memory import polish_memory, stage1_memory, stage2_memory
from davae.plan.figures import MetaUpgrade, TokenPlan
from davae.plan.phase_remedies import REMEDIES, disk_notes, text_notes
from davae.plan.phase_sizes import Phase, PhaseSizes, count_images, text_facts
from davae.plan.phases import plan_phases
from davae.pretrained.offline import readable
from davae.recipes import load_recipe, shipped_recipes
from davae.recipes.base import BaseRecipe
from davae.recipes.hardware import GIB, GPUS, UTILISATION
from davae.recipes.sections import Hardware, Optim
from davae.recipes.stages import POLISH
from davae.recipes.upgrade import Recipe
from davae.runs.checks import check_distilled, check_init, check_objective, check_recipe
from davae.tasks.base_model import BaseModel
from davae.train.shares import Share, share_of_step
from davae.zoo import resolve
from davae.zoo.presets import presets

DAY = 86400
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


def plan(recipe: Recipe, folder: Path | None = None) -> Plan:
    """Return the figures of a dry run from configs alone.

    A hub model that cannot be reached is read from its preset.

    Args:
        recipe: of the run.
        folder: of the run, whose free disk is compared with the disk that the run takes.
    """
    recipe, missing = with_known_base(recipe)
    model, note = (None, "") if recipe.base.model is None else readable(resolve(recipe.base.model))
    base = BaseModel.of(recipe, configs=model)
    shapes, layout = base.shapes, check_recipe(recipe, base)
    check_init(recipe, shapes)
    objective = check_objective(recipe, base)
    upgrade = MetaUpgrade(shapes, layout, recipe.stage2.detail_offset)
    tokens = upgrade.tokens(recipe.resolution)
    sizes = recipe_sizes(recipe, upgrade, tokens, base)
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
        if recipe.hardware is not None:
            figures |= on_hardware(name, sizes, device)
    text_figures, text_note = text_notes(sizes)
    known = check_distilled(recipe, base)
    notes = [missing or note] if missing or note else []
    notes += [] if known is None else [known.note(recipe.base.name)]
    notes += [*step_notes(recipe), *text_note, *assumption_notes(sizes)]
    notes += [] if folder is None else disk_notes(phases, folder)
    return Plan(figures | text_figures, notes, phases, sizes.hardware)


def recipe_sizes(recipe: Recipe, upgrade: MetaUpgrade, tokens: TokenPlan, base: BaseModel) -> PhaseSizes:
    """Return the sizes that the phases of a recipe are computed from.

    Args:
        tokens: of the recipe's resolution.
        base: model that is upgraded.
    """
    shapes, layout = upgrade.shapes, upgrade.layout
    processes = 1 if recipe.hardware is None else recipe.hardware.count
    shares = {
        name: share_of_step(settings, name, processes, recipe.hardware) for name, settings in recipe.trainings.items()
    }
    own1, own2 = own_settings(recipe.stage1, shares["stage1"]), own_settings(recipe.stage2, shares["stage2"])
    mixed = recipe.run.mixed_precision != "no"
    base_dtype = getattr(torch, recipe.base.dtype)
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
        images=count_images(recipe.stage2_data, recipe.resolution),
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


def with_known_base(recipe: Recipe) -> tuple[Recipe, str]:
    """Return a recipe whose base can be read from configs, and a note on where it is read.

    A folder that does not exist yet is read from its origin: `runs/NAME/pipeline` from the shipped base recipe NAME,
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
    """Return whether a stage fits the stated GPUs and how long it takes.

    Args:
        name: of the training.
        device: bytes of the phase on one GPU.
    """
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
