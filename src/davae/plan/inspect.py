"""`davae inspect`: gains and costs of an upgrade of a model, from its configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from davae.backbones.classes_by_name import model_class
from davae.cost.flops import autoencoder_flops, count, count_flops, text_tokens
from davae.cost.memory import (
    TrainingStep,
    decode_sampling_bytes,
    stage1_memory,
    stage2_memory,
    transformer_sampling_bytes,
)
from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.plan.counted import picture_figures
from davae.plan.dry_run import Plan
from davae.plan.figures import MetaUpgrade, check_resolution, token_counts
from davae.plan.phase_sizes import ASSUMED_IMAGES, ImageFacts, PhaseSizes, text_facts
from davae.plan.phases import drawing_request, plan_phases, remember
from davae.pretrained.offline import readable
from davae.pretrained.shapes import BaseShapes
from davae.pretrained.text_encoders import TextEncoder
from davae.recipes.sections import Lora, Run, Stage1, Stage2
from davae.recipes.upgrade import Base, Recipe
from davae.tasks.base_model import BaseModel
from davae.train.shares import Share
from davae.zoo import resolve
from davae.zoo.presets import find_preset

LORA_RANK = 256  # Tab. S1
STEPS, IMAGES = 10_000, (16, 128)  # Tab. S1, text-to-image


@dataclass(frozen=True)
class Inspection:
    """Plain figures under plain keys, and notes on parts that are not supported or not counted.

    FLOPs count two for a multiply-add; bytes are those of one image a step; figures that cannot be counted are left out.
    """

    model: str
    shapes: BaseShapes
    layout: LatentLayout
    figures: dict[str, float]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of `davae inspect`, without the phases."""
        return {
            "model": self.model,
            "pipeline": self.shapes.pipeline_class,
            "transformer": self.shapes.transformer_class,
            "vae": self.shapes.vae_class,
            **self.figures,
            "notes": self.notes,
        }


def inspect_model(
    model: str,
    resolution: int | None = None,
    scale: int = 2,
    detail_channels: int | None = None,
    steps: int | None = None,
    watch: Callable[[str], None] = lambda part: None,
) -> Inspection:
    """Return the figures of an upgrade from configs, without weights.

    Args:
        model: a hub id, a folder, a preset's name, or an embedded model's.
        resolution: pixels of the upgraded image; by default `scale` times the model's own.
        scale: of the upgrade.
        detail_channels: D; by default as many as C.
        steps: sampling steps of the whole image; by default the stock pipeline's.
        watch: called with the name of each part before it is counted.

    Raises:
        ModelError: unknown model, unsupported class, parts that do not belong together, sizes that do not divide.
    """
    name, note = readable(resolve(model))
    pretrained = BaseModel(name, title=model, to_train=False)
    shapes, family, known = pretrained.shapes, pretrained.family, pretrained.distilled
    notes = [*([note] if note else []), *([] if known is None else [known.note(model)])]
    resolution = resolution or scale * native_resolution(name, shapes)
    try:
        layout = LatentLayout(shapes.channels, detail_channels or shapes.channels, scale)
        check_resolution(shapes, resolution, scale)
        upgrade = MetaUpgrade(shapes, layout)
        _ = upgrade.detail_vae, upgrade.expanded  # made here, where an error concerns the layout
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    tokens = token_counts(shapes, resolution, scale)
    figures: dict[str, float] = {
        "resolution": resolution,
        "scale": scale,
        "base_channels": layout.base_channels,
        "detail_channels": layout.detail_channels,
        "vae_factor": shapes.vae_factor,
        "patch_size": shapes.patch_size,
        "latent_side": resolution // (shapes.vae_factor * scale),
        "native_tokens": tokens[0],
        "upgraded_tokens": tokens[1],
    }
    if not family.trains:
        notes.append(
            f"expand_transformer widens a {shapes.transformer_class}, but `davae upgrade` cannot train one: its family "
            "has no call, so that its FLOPs and memory are not counted either"
        )
    watch("FLOPs and parameters")
    figures |= _parameters(upgrade, encoders := pretrained.text_encoders)
    try:
        figures |= _flops(upgrade, resolution, steps, encoders, family.trains)
    except ValueError as error:  # positions beyond the transformer's table, say
        raise ModelError(f"model {model} at {resolution} px: {error}") from error
    figures |= _training_memory(upgrade, resolution, family.trains, watch)
    figures |= _sampling_memory(upgrade, resolution, family.trains, figures, watch)
    return Inspection(model, shapes, layout, figures, notes)


def native_resolution(model: str, shapes: BaseShapes) -> int:
    """Return the pixels that a model draws by default.

    Args:
        model: folder, preset or hub id.
        shapes: its configs.

    Raises:
        ModelError: no config contains the size.
    """
    preset = None if Path(model).is_dir() else find_preset(model)
    if preset is not None:
        return preset.resolution
    side = shapes.transformer_config.get("sample_size")
    if side is None:
        raise ModelError(f"model {model} has no sample_size in its config; give --resolution")
    return int(side) * shapes.vae_factor


def passes_per_step(shapes: BaseShapes) -> int:
    """Return 2 with classifier-free guidance, 1 where guidance is distilled into the model."""
    return 1 if shapes.transformer_config.get("guidance_embeds") else 2


def default_steps(pipeline_class: str) -> int:
    """Return the number of sampling steps that the stock pipeline takes by default."""
    return int(inspect.signature(model_class(pipeline_class).__call__).parameters["num_inference_steps"].default)


def _parameters(upgrade: MetaUpgrade, encoders: list[TextEncoder]) -> dict[str, float]:
    """Return the parameters of every part, and how many of them train."""
    return {
        "transformer_parameters": upgrade.base.num_parameters(),
        f"trained_parameters_lora{LORA_RANK}": upgrade.trained(Lora(rank=LORA_RANK)),
        "trained_parameters_full": upgrade.trained(None),
        "vae_parameters": upgrade.base_vae.num_parameters(),
        "detail_vae_parameters": upgrade.detail_vae.num_parameters(),
        "detail_vae_trained_parameters": upgrade.detail_vae.num_parameters(only_trainable=True),
        "text_encoder_parameters": sum(count(encoder.on_meta().parameters()) for encoder in encoders),
    }


def _flops(
    upgrade: MetaUpgrade, resolution: int, steps: int | None, encoders: list[TextEncoder], trains: bool
) -> dict[str, float]:
    """Return the work of every part for one image, and the upper bounds of the speed-ups."""
    shapes = upgrade.shapes
    passes, steps = passes_per_step(shapes), steps or default_steps(shapes.pipeline_class)
    figures: dict[str, float] = {"steps": steps, "passes_per_step": passes}
    text = 0.0
    for encoder in encoders:
        with torch.device("meta"):
            prompt, module = torch.zeros(1, encoder.tokens, dtype=torch.long), encoder.on_meta()
            flops = count_flops(lambda module=module, prompt=prompt: module(prompt))
        figures |= {f"{encoder.component}_tokens": encoder.tokens, **flops.as_dict(encoder.component)}
        text += passes * flops.total  # the prompt and the negative prompt
    figures["text_flops"] = text
    for name, vae in (("native", upgrade.base_vae), ("upgraded", upgrade.detail_vae)):
        encode, decode = autoencoder_flops(vae, resolution)
        figures |= {**encode.as_dict(f"{name}_vae_encode"), **decode.as_dict(f"{name}_vae_decode")}
    if not trains:
        return figures
    tokens = upgrade.tokens(resolution)
    figures |= {
        "text_tokens": text_tokens(upgrade.base),
        **tokens.native.as_dict("native"),
        **tokens.upgraded.as_dict("upgraded"),
        "bound": tokens.bound,
    }
    return figures | picture_figures(figures, steps)


def _training_memory(
    upgrade: MetaUpgrade, resolution: int, trains: bool, watch: Callable[[str], None]
) -> dict[str, float]:
    """Return the bytes of training one image a step in bfloat16 mixed precision."""
    shapes, layout = upgrade.shapes, upgrade.layout
    watch("memory of stage 1")
    stage1 = stage1_memory(
        shapes, layout.detail_channels, layout.scale, resolution, Stage1(max_steps=1, batch_size=1), mixed=True
    )
    found: dict[str, float] = {f"stage1_{key}_bytes": value for key, value in stage1.as_dict().items()}
    if not trains:
        return found
    side = resolution // (shapes.vae_factor * layout.scale)
    for name, lora, checkpointing in (
        ("stage2_lora", Lora(rank=LORA_RANK), False),
        ("stage2_lora_checkpointed", Lora(rank=LORA_RANK), True),
        ("stage2_full_checkpointed", None, True),
    ):
        if checkpointing and not model_class(shapes.transformer_class)._supports_gradient_checkpointing:
            continue
        watch(f"memory of {name.replace('_', ' ')}")
        settings = Stage2(max_steps=1, batch_size=1, lora=lora, gradient_checkpointing=checkpointing)
        step = stage2_memory(shapes, layout, side, settings, mixed=True)
        found |= {f"{name}_{key}_bytes": value for key, value in step.as_dict().items()}
    return found


def _sampling_memory(
    upgrade: MetaUpgrade, resolution: int, trains: bool, figures: dict[str, float], watch: Callable[[str], None]
) -> dict[str, float]:
    """Return the bytes of drawing one image in bfloat16."""
    shapes, layout = upgrade.shapes, upgrade.layout
    side, half = resolution // shapes.vae_factor, 2  # bytes of a bfloat16
    found: dict[str, float] = {}
    for name, grid, channels, part in (
        ("native", side, layout.base_channels, "vae"),
        ("upgraded", side // layout.scale, layout.channels, "detail_vae"),
    ):
        parameters = figures["transformer_parameters"] + figures[f"{part}_parameters"]
        weights = half * figures["text_encoder_parameters"] + half * parameters
        watch(f"memory of sampling, {name}")
        fresh = MetaUpgrade(shapes, layout)  # rehearsals change the modules
        work = decode_sampling_bytes(getattr(fresh, "base_vae" if part == "vae" else part), channels, grid)
        found |= {f"{name}_sampling_weights_bytes": weights, f"{name}_sampling_decode_bytes": work}
        if trains:
            transformer = fresh.base if name == "native" else fresh.expanded
            step_bytes = transformer_sampling_bytes(transformer, grid, passes_per_step(shapes))
            found |= {
                f"{name}_sampling_transformer_bytes": step_bytes,
                f"{name}_sampling_peak_bytes": weights + max(work, step_bytes),
            }
    return found


# -- phases ----------------------------------------------------------------------------------------------------------


def step_of(found: Inspection, prefix: str, flops: float) -> TrainingStep:
    """Return a rehearsed training step from the inspection's figures.

    Args:
        prefix: of the figures' keys.
        flops: of the step.
    """
    names = ("weights", "gradients", "optimizer", "ema", "activations")
    return TrainingStep(**{name: int(found.figures[f"{prefix}_{name}_bytes"]) for name in names}, flops=flops)


def inspected_phases(found: Inspection) -> Plan | None:
    """Return the phases of an inspected model's upgrade, None where davae cannot train it.

    They have the steps and batches of Tab. S1, one image a pass, and one GPU of the dry run's default.
    """
    f, shapes = found.figures, found.shapes
    if "bound" not in f:
        return None
    recipe = Recipe(
        name="inspect",
        base=Base(model=found.model, resolution=int(f["resolution"]) // int(f["scale"])),
        scale=int(f["scale"]),
        detail_channels=found.layout.detail_channels,
        stage1=Stage1(max_steps=STEPS, batch_size=1, accumulation=IMAGES[0]),
        stage2=Stage2(max_steps=STEPS, batch_size=1, accumulation=IMAGES[1], lora=Lora(rank=LORA_RANK)),
        run=Run(mixed_precision="bf16"),
    )
    kind = "stage2_lora_checkpointed" if "stage2_lora_checkpointed_peak_bytes" in f else "stage2_lora"
    encode, decode = f["upgraded_vae_encode_flops"], f["upgraded_vae_decode_flops"]
    sizes = PhaseSizes(
        recipe=recipe,
        shapes=shapes,
        layout=found.layout,
        step1=step_of(found, "stage1", 3 * (encode + decode)),
        step2=step_of(found, kind, (4 if "checkpointed" in kind else 3) * f["upgraded_flops"]),
        text=text_facts(BaseModel(readable(resolve(found.model))[0])),
        images=ImageFacts(ASSUMED_IMAGES, False),
        transformer=int(f["transformer_parameters"]),
        trained=int(f[f"trained_parameters_lora{LORA_RANK}"]),
        base_vae=int(f["vae_parameters"]),
        detail_vae=int(f["detail_vae_parameters"]),
        encode_flops=encode,
        decode_flops=decode,
        upgraded_flops=f["upgraded_flops"],
        native_flops=f["native_flops"],
        share1=Share(1, IMAGES[0]),
        share2=Share(1, IMAGES[1]),
    )
    take_over(found, sizes)
    return Plan({}, [], plan_phases(sizes), sizes.hardware)


def take_over(found: Inspection, sizes: PhaseSizes) -> None:
    """Give the phases the sampling memory that the inspection has rehearsed."""
    f = found.figures
    for name, factor in (("native", sizes.layout.scale), ("upgraded", 1)):
        asked = drawing_request(sizes, int(f["latent_side"]) * factor, upgraded=name == "upgraded")
        remember(int(f[f"{name}_sampling_decode_bytes"]), "decode", asked)
        remember(int(f[f"{name}_sampling_transformer_bytes"]), "pass", int(f["passes_per_step"]), asked)
