"""Parameters that stage 2 trains: all, or LoRA and the layers that Eq. 7-11 widen."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from davae.backbones.families import family_of
from davae.backbones.head_options import BUFFERS
from davae.errors import RecipeError

NORM_CLASS = re.compile("Norm|Modulation")
# proj_out_1 is the last modulation of diffusers' DiT
NORM_NAME = re.compile(r"norm|modulation|adaln|scale_shift_table|(^|_)mod(_|$)|^proj_out_1$", re.IGNORECASE)


class LoraSettings(Protocol):
    """Rank, alpha, further layers and norms of a LoRA, as in `stage2.lora` of a recipe.

    Where alpha is None, it is the rank.
    """

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float | None: ...

    @property
    def extra_targets(self) -> Sequence[str]: ...

    @property
    def train_norms(self) -> bool: ...


def choose_trainable(transformer: nn.Module, lora: LoraSettings | None) -> list[nn.Parameter]:
    """Mark and return, in module order, the parameters that stage 2 trains.

    These are all parameters, or LoRA and all of P, P', O, O', and of the modulation by the detail's time where it has one,
    with `norm_parameters` where the LoRA trains them.

    An expanded transformer shares its tensors with the pretrained one; those that are trained get storage of their own.

    Args:
        transformer: an expanded transformer.
        lora: None to train everything.

    Raises:
        RecipeError: a further target of the LoRA that no layer has, or one that is trained in full.
    """
    family = family_of(transformer)
    if lora is None:
        transformer.requires_grad_(True)
        for name in family.fixed:
            transformer.get_parameter(name).requires_grad_(False)
    else:
        transformer.requires_grad_(False)
        norms = norm_parameters(transformer) if lora.train_norms else {}
        extra = tuple(re.escape(end) for end in lora.extra_targets)
        for end, pattern in zip(lora.extra_targets, extra, strict=True):
            check_target(transformer, end, _lora_pattern(pattern), in_full=norms)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
            target_modules=_lora_pattern(*family.lora_targets, *extra),
        )
        inject_adapter_in_model(config, transformer)  # not add_adapter, which DiT and Hunyuan-DiT lack
        whole = [family.embedder, family.head]
        if family.detail_time is not None and getattr(transformer, family.detail_time) is not None:
            whole.append(family.detail_time)
        for path in whole:
            transformer.get_submodule(path).requires_grad_(True)
        for parameter in norms.values():
            parameter.requires_grad_(True)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.clone()
    return trainable


def norm_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights and biases of a transformer's norms and modulation layers, by name.

    They are those of modules whose class or name is a norm's or a modulation's, and tables of shift and scale. Embeddings of
    time and class that some classes keep in their first norm are left out.
    """
    modules = dict(transformer.named_modules())

    def is_norm(name: str) -> bool:
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        by_class = any(NORM_CLASS.search(type(modules[path]).__name__) for path in paths)
        return "emb" not in parts and (by_class or any(NORM_NAME.search(part) for part in parts))

    return {name: parameter for name, parameter in transformer.named_parameters() if is_norm(name)}


def in_full_precision(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Move trained parameters to float32 where the base is in half precision.

    Small updates would round away in half precision.
    """
    for parameter in parameters:
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = parameter.data.float()
    return parameters


def _lora_pattern(*ends: str) -> str:
    """Return a regular expression of whole layer names with one of these ends."""
    return rf"(?:.*\.)?(?:{'|'.join(ends)})"


def check_target(transformer: nn.Module, end: str, pattern: str, in_full: Container[str] = ()) -> None:
    """Check a further target of a LoRA.

    Args:
        end: of the layers' names.
        pattern: of their whole names.
        in_full: names of parameters that are trained in full.

    Raises:
        RecipeError: no linear layer or convolution has such a name, or one of them is trained in full.
    """
    found = [
        name
        for name, layer in transformer.named_modules()
        if re.fullmatch(pattern, name) and isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    if twice := [name for name in found if f"{name}.weight" in in_full]:
        raise RecipeError(
            f"stage2.lora.extra_targets: '{end}' adapts {twice[0]}, which train_norms trains in full; leave one of them out"
        )
    if found:
        return
    raise RecipeError(
        f"stage2.lora.extra_targets: no layer of {type(transformer).__name__} has a name that ends in '{end}'; name linear "
        "layers, as norm1.linear"
    )


@torch.no_grad()
def restore_trained(module: nn.Module, state: dict[str, Any], player: str) -> None:
    """Copy the trained parameters of a checkpoint, or their kept average, into a module.

    Args:
        module: whose trained parameters are marked.
        state: of the checkpoint.
        player: name of the module there.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    values = [state["players"][player][name] for name in trained]
    if player in state["ema"]:
        values = [state["ema"][player]["shadow"][name] for name in trained]
    for parameter, value in zip(trained.values(), values, strict=True):
        parameter.copy_(value)
    for name, buffer in module.named_buffers():
        if name.startswith(BUFFERS):
            buffer.copy_(state["players"][player][name])
