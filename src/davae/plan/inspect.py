"""What an upgrade of a model would bring and take, from its configs: `davae inspect`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import expand_transformer
from davae.backbones.families import family_by_class
from davae.backbones.trainable import choose_trainable
from davae.cost.flops import (
    Flops,
    autoencoder_flops,
    count,
    count_flops,
    meta_autoencoder,
    meta_detail_vae,
    meta_transformer,
    text_tokens,
    transformer_flops,
)
from davae.cost.memory import decode_sampling_bytes, stage1_memory, stage2_memory, transformer_sampling_bytes
from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.plan.counted import picture_figures
from davae.plan.dry_run import check_resolution
from davae.pretrained.distilled import distilled
from davae.pretrained.offline import preset_of, readable
from davae.pretrained.open import BaseShapes, read_shapes
from davae.pretrained.text_encoders import TextEncoder, text_encoders
from davae.recipes.sections import Lora, Stage1, Stage2
from davae.zoo import resolve

LORA_RANK = 256  # Tab. S1


@dataclass(frozen=True)
class Inspection:
    """Plain figures under plain keys, and sentences on what is not supported or not counted.

    FLOPs count two for a multiply-add; bytes are those of one picture a step; `None` stands where nothing could be counted.
    """

    model: str
    shapes: BaseShapes
    layout: LatentLayout
    figures: dict[str, float]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
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
    """Read configs, count on the meta device, rehearse memory. Needs no weights.

    Args:
        model: a hub id, a folder, a preset's name, or an embedded model's.
        resolution: pixels of the upgraded picture; by default `scale` times the model's own.
        detail_channels: D; by default as many as C.
        steps: sampling steps of the whole picture; by default the stock pipeline's.
        watch: called with what is counted next.

    Raises:
        ModelError: unknown model, unsupported class, parts that do not belong together, sizes that do not divide.
    """
    name, note = readable(resolve(model))
    shapes = read_shapes(name, to_train=False)
    family = family_by_class(shapes.transformer_class)
    known = distilled(name, model)
    notes = [*([note] if note else []), *([] if known is None else [known.note(model)])]
    resolution = resolution or scale * native_resolution(name, shapes)
    try:
        layout = LatentLayout(shapes.channels, detail_channels or shapes.channels, scale)
        check_resolution(shapes, resolution, scale)
        vae = meta_detail_vae(shapes, layout.detail_channels, scale)
        with torch.device("meta"):
            base = meta_transformer(shapes)
            wide = expand_transformer(base, layout.detail_channels)
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    side = resolution // (shapes.vae_factor * scale)
    tokens = (side // shapes.patch_size) ** 2
    figures: dict[str, float] = {
        "resolution": resolution,
        "scale": scale,
        "base_channels": layout.base_channels,
        "detail_channels": layout.detail_channels,
        "vae_factor": shapes.vae_factor,
        "patch_size": shapes.patch_size,
        "latent_side": side,
        "native_tokens": tokens * scale**2,
        "upgraded_tokens": tokens,
    }
    if not family.trains:
        notes.append(
            f"expand_transformer widens a {shapes.transformer_class}, but `davae upgrade` cannot train one: models/calls has "
            "no call of it, so that its FLOPs and memory are not counted either"
        )
    watch("FLOPs and parameters")
    encoders = text_encoders(name, shapes.transformer_config)
    own = meta_autoencoder(shapes)
    figures |= _parameters(shapes, layout, base, vae, encoders, own)
    try:
        figures |= _flops(
            shapes, layout, resolution, steps, encoders, (base, wide) if family.trains else None, (own, vae)
        )
    except ValueError as error:  # positions beyond the transformer's table, say
        raise ModelError(f"model {model} at {resolution} px: {error}") from error
    figures |= _memory(shapes, layout, resolution, family.trains, figures, watch)
    return Inspection(model, shapes, layout, figures, notes)


def readable_name(model: str) -> str:
    """Return where a model's configs are read from."""
    return readable(resolve(model))[0]


def native_resolution(model: str, shapes: BaseShapes) -> int:
    """Pixels that the model draws by default.

    Raises:
        ModelError: when no config says it.
    """
    preset = preset_of(model)
    if preset is not None:
        return preset.resolution
    side = shapes.transformer_config.get("sample_size")
    if side is None:
        raise ModelError(f"model {model} does not say what size it draws; give --resolution")
    return int(side) * shapes.vae_factor


def passes_per_step(shapes: BaseShapes) -> int:
    """2 with classifier-free guidance, 1 where guidance is distilled into the model."""
    return 1 if shapes.transformer_config.get("guidance_embeds") else 2


def default_steps(pipeline_class: str) -> int:
    """Steps that the stock pipeline takes when it is not told."""
    return int(inspect.signature(model_class(pipeline_class).__call__).parameters["num_inference_steps"].default)


def _parameters(
    shapes: BaseShapes, layout: LatentLayout, base: Any, vae: Any, encoders: list[TextEncoder], own: Any
) -> dict[str, float]:
    """Parameters of every part, and how many of them train."""
    with torch.device("meta"):
        lora, full = (expand_transformer(base, layout.detail_channels) for _ in range(2))
        return {
            "transformer_parameters": count(base.parameters()),
            f"trained_parameters_lora{LORA_RANK}": count(choose_trainable(lora, Lora(rank=LORA_RANK))),
            "trained_parameters_full": count(choose_trainable(full, None)),
            "vae_parameters": count(own.parameters()),
            "detail_vae_parameters": count(vae.parameters()),
            "detail_vae_trained_parameters": count(p for p in vae.parameters() if p.requires_grad),
            "text_encoder_parameters": sum(count(encoder.on_meta().parameters()) for encoder in encoders),
        }


def _flops(
    shapes: BaseShapes,
    layout: LatentLayout,
    resolution: int,
    steps: int | None,
    encoders: list[TextEncoder],
    transformers: tuple[Any, Any] | None,
    vaes: tuple[Any, Any],
) -> dict[str, float]:
    """Work of every part for one picture, and the speed-ups that follow from it at most."""
    passes, steps = passes_per_step(shapes), steps or default_steps(shapes.pipeline_class)
    figures: dict[str, float] = {"steps": steps, "passes_per_step": passes}
    text = 0.0
    for encoder in encoders:
        with torch.device("meta"):
            prompt, module = torch.zeros(1, encoder.tokens, dtype=torch.long), encoder.on_meta()
            flops = count_flops(lambda module=module, prompt=prompt: module(prompt))
        figures |= {f"{encoder.component}_tokens": encoder.tokens, **flops.as_dict(encoder.component)}
        text += passes * flops.total  # the prompt, and what guidance leads away from
    figures["text_flops"] = text
    for name, vae in zip(("native", "upgraded"), vaes, strict=True):
        encode, decode = autoencoder_flops(vae, resolution)
        figures |= {**encode.as_dict(f"{name}_vae_encode"), **decode.as_dict(f"{name}_vae_decode")}
    if transformers is None:
        return figures
    sides = (resolution // shapes.vae_factor, resolution // (shapes.vae_factor * layout.scale))
    each: list[Flops] = [transformer_flops(t, side) for t, side in zip(transformers, sides, strict=True)]
    figures |= {
        "text_tokens": text_tokens(transformers[0]),
        **each[0].as_dict("native"),
        **each[1].as_dict("upgraded"),
        "bound": each[0].total / each[1].total,
    }
    return figures | picture_figures(figures, steps)


def _memory(
    shapes: BaseShapes,
    layout: LatentLayout,
    resolution: int,
    counted: bool,
    figures: dict[str, float],
    watch: Callable[[str], None],
) -> dict[str, float]:
    """Bytes of training one picture a step in bfloat16 mixed precision, and of drawing one in bfloat16."""
    side, factor = int(figures["latent_side"]), shapes.vae_factor
    found: dict[str, float] = {}
    watch("memory of stage 1")
    stage1 = stage1_memory(
        shapes, layout.detail_channels, layout.scale, resolution, Stage1(max_steps=1, batch_size=1), mixed=True
    )
    found |= {f"stage1_{key}_bytes": value for key, value in stage1.as_dict().items()}
    if counted:
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
    half = 2  # bytes of a bfloat16
    text = half * figures["text_encoder_parameters"]
    for name, vae, grid, channels in (
        ("native", meta_autoencoder(shapes), resolution // factor, layout.base_channels),
        ("upgraded", meta_detail_vae(shapes, layout.detail_channels, layout.scale), side, layout.channels),
    ):
        parameters = figures["vae_parameters" if name == "native" else "detail_vae_parameters"]
        weights = text + half * (figures["transformer_parameters"] + parameters)
        watch(f"memory of sampling, {name}")
        work = decode_sampling_bytes(vae, channels, grid)
        found |= {f"{name}_sampling_weights_bytes": weights, f"{name}_sampling_decode_bytes": work}
        if counted:
            with torch.device("meta"):
                transformer = meta_transformer(shapes)
                if name == "upgraded":
                    transformer = expand_transformer(transformer, layout.detail_channels)
            step_bytes = transformer_sampling_bytes(transformer, grid, passes_per_step(shapes))
            found |= {
                f"{name}_sampling_transformer_bytes": step_bytes,
                f"{name}_sampling_peak_bytes": weights + max(work, step_bytes),
            }
    return found
