"""Registry of model families, found by class name, model or pipeline.

Its rows are those of the files of this folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Container
from typing import Any

from torch import nn

from davae.backbones.families.cogview import COGVIEW
from davae.backbones.families.dit import DIT
from davae.backbones.families.expand_only import EXPAND_ONLY
from davae.backbones.families.flux import FLUX
from davae.backbones.families.lumina import LUMINA
from davae.backbones.families.others import OTHERS
from davae.backbones.families.pixart import PIXART
from davae.backbones.families.qwen import QWEN
from davae.backbones.families.stable_diffusion import STABLE_DIFFUSION
from davae.backbones.family import Family
from davae.errors import ModelError

FAMILIES: dict[str, Family] = {
    family.class_name: family
    for family in (
        *STABLE_DIFFUSION,
        *DIT,
        *FLUX,
        *PIXART,
        *LUMINA,
        *COGVIEW,
        *QWEN,
        *OTHERS,
        *EXPAND_ONLY,
    )
}


def supported() -> tuple[Family, ...]:
    """Return all families, those that can only be expanded included."""
    return tuple(FAMILIES.values())


def family_by_class(name: str) -> Family:
    """Return the family of a model class.

    Raises:
        ValueError: a class that is not supported; the message names the nearest ones that are.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.0)
        raise ValueError(
            f"transformer class {name} is not supported; the nearest of {len(FAMILIES)} that are: "
            f"{', '.join(near)}. A Family in davae/backbones/families adds one"
        )
    return FAMILIES[name]


def family_of(model: Any) -> Family:
    """Return the family of a transformer or U-Net, or of the one in a pipeline.

    Raises:
        ValueError: a class that is not supported.
        ModelError: a pipeline without a transformer or U-Net.
    """
    return family_by_class(type(uncompiled(model if isinstance(model, nn.Module) else denoiser(model))).__name__)


def uncompiled(model: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or a plain module itself."""
    return getattr(model, "_orig_mod", model)


def denoiser(pipeline: Any) -> Any:
    """Return a pipeline's transformer or U-Net.

    Raises:
        ModelError: a pipeline that has neither.
    """
    name = component_in(pipeline.components)
    if name is None:
        raise ModelError(f"a {type(pipeline).__name__} has no transformer or U-Net")
    return pipeline.components[name]


def component_in(parts: Container[str]) -> str | None:
    """Return the name of the transformer or U-Net among a pipeline's parts, or None."""
    return next((family.component for family in supported() if family.component in parts), None)
