"""Distilled models, recognised by scheduler, config and name.

A model distilled to a few steps (Turbo, Lightning, LCM, ...) was taught to jump; flow matching or DDPM training on top
undoes that and leaves a model that is good at neither. A guidance-distilled model (FLUX.1-dev) takes the guidance scale
as an input; it can be trained, with a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from davae.backbones.families import component_in
from davae.errors import ModelError
from davae.pretrained.open import Configs, class_name
from davae.zoo.presets import find_preset

SEPARATORS = re.compile(r"[^a-z0-9]+")
# words of a repository's or folder's name -> what it is
WORDS = {
    "turbo": "Turbo",
    "schnell": "FLUX schnell",
    "lightning": "Lightning",
    "hyper": "Hyper-SD",
    "hypersd": "Hyper-SD",
    "lcm": "a latent consistency model",
    "dmd": "DMD",
    "dmd2": "DMD",
    "tcd": "trajectory consistency distillation",
    "pcm": "a phased consistency model",
    "sprint": "SANA-Sprint",
    "flash": "Flash",
    "distilled": "distilled",
    "distill": "distilled",
}
UNDONE = ("de", "un", "non", "not")  # `de-distill`
STEPS = re.compile(r"^[1-9][0-9]?steps?$")
PIPELINES = {
    "SanaSprintPipeline": ("SANA-Sprint", "SANA-1.5"),
    "LatentConsistencyModelPipeline": ("a latent consistency model", "the model that it was distilled from"),
}
SCHEDULERS = {
    "LCMScheduler": "a latent consistency model",
    "FlowMatchLCMScheduler": "a latent consistency model",
    "TCDScheduler": "trajectory consistency distillation",
    "SCMScheduler": "SANA-Sprint",
    "CMStochasticIterativeScheduler": "a consistency model",
}
INSTEAD = {
    "FluxTransformer2DModel": "FLUX.1-dev",
    "Flux2Transformer2DModel": "FLUX.2-klein-base or FLUX.2-dev",
    "SD3Transformer2DModel": "SD3.5 Medium or Large",
    "SanaTransformer2DModel": "SANA-1.5",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "ZImageTransformer2DModel": "Z-Image (not Turbo)",
    "PixArtTransformer2DModel": "PixArt-alpha or PixArt-Sigma",
    "HunyuanDiT2DModel": "HunyuanDiT-v1.2-Diffusers",
    "HunyuanImageTransformer2DModel": "HunyuanImage-2.1",
    "HiDreamImageTransformer2DModel": "HiDream-I1-Full",
    "UNet2DConditionModel": "SD 1.5 or SDXL",
}


@dataclass(frozen=True)
class Distilled:
    """Kind of a distilled model.

    Attributes:
        kind: `steps`: to a few steps; `guidance`: with the guidance scale as an input.
        what: its kind by name, such as `Turbo`.
        sign: where that was seen.
        instead: the model to upgrade in its place.
    """

    kind: Literal["steps", "guidance"]
    what: str
    sign: str
    instead: str

    def note(self, name: str) -> str:
        """Return a sentence for a plan: what training does to the model."""
        if self.kind == "guidance":
            return (
                f"{name} is guidance-distilled ({self.sign}): it takes the guidance scale as an input, without a second "
                "pass; real images are what it should learn at guidance 1"
            )
        return (
            f"{name} is {self.what} ({self.sign}), distilled to a few steps, which training would undo; upgrade the model "
            f"that it was distilled from instead: {self.instead}"
        )


Config = dict[str, Any]


def _same(value: Any, expected: float) -> bool:
    return type(value) in (int, float) and math.isclose(value, expected, abs_tol=1e-3)


# transformer class -> (what it is, its sign, whether config, scheduler and index are those of the distilled model)
SIGNS: dict[str, tuple[str, str, Callable[[Config, Config, Config], bool]]] = {
    "FluxTransformer2DModel": (
        "FLUX schnell",
        "guidance_embeds is false and the scheduler does not shift by size",
        lambda model, scheduler, index: (
            model.get("guidance_embeds") is False
            and model.get("num_single_layers", 38) == 38
            and model.get("num_layers", 19) == 19
            and not scheduler.get("use_dynamic_shifting")
        ),
    ),
    "Flux2Transformer2DModel": (
        "FLUX.2 Klein",
        "is_distilled is true",
        lambda model, scheduler, index: bool(index.get("is_distilled")),
    ),
    "ZImageTransformer2DModel": (
        "Z-Image-Turbo",
        "the scheduler's shift is 3, that of Z-Image is 6",
        lambda model, scheduler, index: _same(scheduler.get("shift"), 3.0),
    ),
    "QwenImageTransformer2DModel": (
        "Qwen-Image-Lightning",
        "the scheduler's base_shift and max_shift are both log 3",
        lambda model, scheduler, index: all(
            _same(scheduler.get(key), math.log(3)) for key in ("base_shift", "max_shift")
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        "HunyuanImage distilled",
        "use_meanflow is true",
        lambda model, scheduler, index: bool(model.get("use_meanflow")),
    ),
    "UNet2DConditionModel": (
        "Turbo or a latent consistency model",
        "an ancestral scheduler with trailing steps, or time_cond_proj_dim",
        lambda model, scheduler, index: (
            model.get("time_cond_proj_dim") is not None
            or (
                scheduler.get("_class_name") == "EulerAncestralDiscreteScheduler"
                and scheduler.get("timestep_spacing") == "trailing"
            )
        ),
    ),
}


def find_distilled(
    name: str, index: Config, transformer_class: str, transformer: Config, scheduler: Config
) -> Distilled | None:
    """Return the distillation of a model from its configs, None for a model without any.

    Args:
        name: hub id or folder.
        index: its model_index.json.
        transformer_class, transformer: class and config of its transformer or U-Net.
        scheduler: its scheduler's config; {} where it has none.
    """
    instead = INSTEAD.get(transformer_class, "the model that it was distilled from")
    pipeline = str(class_name(index.get("_class_name", "")))
    if pipeline in PIPELINES:
        what, other = PIPELINES[pipeline]
        return Distilled("steps", what, f"a {pipeline}", other)
    entry = index.get("scheduler")
    named = str(scheduler.get("_class_name") or (class_name(entry) if entry else ""))
    if named in SCHEDULERS or "Flash" in named:
        return Distilled("steps", SCHEDULERS.get(named, "distilled"), f"its scheduler is {named}", instead)
    if transformer_class in SIGNS:
        what, sign, matches = SIGNS[transformer_class]
        if matches(transformer, scheduler, index):
            return Distilled("steps", what, sign, instead)
    for place in (name, index.get("_name_or_path"), transformer.get("_name_or_path")):
        if isinstance(place, str) and (what := _named(place, transformer_class, index)):
            return Distilled("steps", what, f"its name is {_short(place)}", instead)
    if transformer.get("guidance_embeds") is True:
        return Distilled("guidance", "guidance-distilled", "guidance_embeds is true", instead)
    return None


def _short(place: str) -> str:
    """Return a hub id as it is, and the last part of a path."""
    plain = place.rstrip("/")
    hub = plain.count("/") == 1 and not plain.startswith((".", "/", "~")) and not Path(place).is_dir()
    return plain if hub else plain.rpartition("/")[2]


def _named(place: str, transformer_class: str, index: Config) -> str | None:
    """Return the kind of distillation in a model's name."""
    words = SEPARATORS.split(_short(place).lower())
    for before, word, after in zip(("", *words), words, (*words[1:], ""), strict=False):
        if (word, after) == ("lightning", "dit"):  # the architecture LightningDiT
            continue
        if word in WORDS and before not in UNDONE:
            return WORDS[word]
        counts = word in ("step", "steps") and before.isdigit() and len(before) < 3 and not after.isdigit()
        if STEPS.match(word) or counts:  # more steps are those of a training
            return f"distilled to {before if before.isdigit() else word} steps"
        if transformer_class.startswith("HiDream") and word in ("fast", "dev"):
            return f"HiDream {word}"
    if "klein" in words and "base" not in words and index.get("is_distilled") is not False:
        return "FLUX.2 Klein"
    return None


def distilled(model: str | Configs, name: str | None = None) -> Distilled | None:
    """Read a model's configs and return its distillation, None for a model without any.

    Args:
        model: folder, hub id or preset where its configs are, or these configs.
        name: what the recipe calls it, where that is another place.

    Raises:
        ModelError: not a diffusers folder.
    """
    configs = Configs.of(model)
    index = configs.index
    part = component_in(index)
    kind = str(class_name(index[part])) if part else ""
    transformer = configs.read(part) if part else {}
    try:
        scheduler = configs.read("scheduler", "scheduler_config.json")
    except ModelError:
        scheduler = {}
    name = name or configs.model
    preset = find_preset(name)
    return find_distilled((preset.hub if preset is not None else None) or name, index, kind, transformer, scheduler)
