"""Presets, the public configs of known models without weights.

With them, models can be inspected and planned for offline.

One YAML file a model; what several share is in `parts.yaml`. Reading them loads no torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from davae.zoo import MODELS, SHIPPED, split_revision

SHARED = "parts.yaml"


@dataclass(frozen=True)
class Preset:
    """A diffusers pipeline folder, reduced to its configs.

    Attributes:
        name: what a user calls it.
        title: one line on what it is.
        hub: the id of its weights; None where official weights have to be converted.
        resolution: pixels, each way, that it draws natively.
        parameters: of the diffusion model alone, as published, in billions.
        pipeline: class of its pipeline.
        parts: name of a component -> its config, with `_class_name`.
    """

    name: str
    title: str
    hub: str | None
    resolution: int
    parameters: float
    pipeline: str
    parts: dict[str, dict[str, Any]]

    def config(self, part: str, filename: str) -> dict[str, Any] | None:
        """Return the content of a JSON file of a diffusers folder, None where it has none."""
        if (part, filename) == ("", "model_index.json"):
            return {
                "_class_name": self.pipeline,
                **{name: [home(name), config["_class_name"]] for name, config in self.parts.items()},
            }
        wanted = "scheduler_config.json" if part == "scheduler" else "config.json"
        return self.parts.get(part) if filename == wanted else None


def home(part: str) -> str:
    return "transformers" if part.startswith("text_encoder") else "diffusers"


@cache
def presets() -> dict[str, Preset]:
    """Every preset by name, in alphabetical order."""
    texts = {e.name: e.read_text(encoding="utf-8") for e in files(__name__).iterdir() if e.name.endswith(".yaml")}
    shared = yaml.safe_load(texts.pop(SHARED))
    return {
        filename.removesuffix(".yaml"): _read(filename.removesuffix(".yaml"), text, shared)
        for filename, text in sorted(texts.items())
    }


def _read(name: str, text: str, shared: dict[str, Any]) -> Preset:
    values = yaml.safe_load(text)
    facts = {key: values.pop(key) for key in ("hub", "resolution", "parameters", "pipeline")}
    for part, value in values.items():
        if isinstance(value, str):
            values[part] = shared["autoencoders" if part == "vae" else "text_encoders"][value]
    return Preset(name, text.splitlines()[0].removeprefix("#").strip(), parts=values, **facts)


def find_preset(model: str) -> Preset | None:
    """Return the preset of that name or hub id, at any revision."""
    name, _ = split_revision(model)
    return next((preset for preset in presets().values() if name in (preset.name, preset.hub)), None)


def nearest_models(model: str, with_presets: bool) -> list[str]:
    """Up to three names of embedded models that look like `model`, and of presets."""
    known = [*(presets() if with_presets else ()), *MODELS, *SHIPPED]
    return difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.4)
