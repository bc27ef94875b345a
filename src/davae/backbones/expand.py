"""P' and O': D more channels into and out of a transformer, with zero weights (Eq. 7-11)."""

from __future__ import annotations

import copy
import operator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from davae.backbones.detail_time import OFFSET
from davae.backbones.families import family_of, uncompiled
from davae.backbones.family import Family
from davae.latent import LatentLayout

Model = TypeVar("Model", bound=nn.Module)
NewWeights = Literal["zero", "random"]
MARK = "_davae_base_channels"  # config key of an expanded transformer; diffusers keeps private keys silently
CLEAN_BASE = "_davae_clean_base"  # private like MARK: the share of training with a clean base, where there was one


def expand_transformer(
    transformer: Model, detail_channels: int, new_weights: NewWeights = "zero", detail_offset: float = 0.0
) -> Model:
    """Widen a pretrained transformer from C to C+D latent channels.

    At step 0 the base velocity equals the pretrained one whatever the detail input (Eq. 9), and the detail velocity is zero
    (Eq. 11). Everything else is shared with `transformer` (same storage); its own embedder and head stay as they were.

    Args:
        transformer: a supported diffusers transformer with C input and C output channels, compiled or not.
        detail_channels: D, a multiple of C.
        new_weights: `random` gives P' and O' the initial values of a fresh layer instead: the ablation of Fig. 4.
        detail_offset: above 0 the detail gets a time of its own, and this is how far the base is ahead in sampling.

    Returns:
        A module of the same class, `in_channels` and `out_channels` of its config raised by D.

    Raises:
        ValueError: unsupported class, D not a multiple of C, a transformer that was expanded already, an embedder or head
            with a LoRA or offloaded, or a class whose channels share one time and a `detail_offset`.
    """
    family, transformer = family_of(transformer), uncompiled(transformer)
    config: Any = transformer.config
    if MARK in config:
        raise ValueError(
            f"this {family.class_name} was expanded already ({config[MARK]} base channels of "
            f"{latent_channels(transformer)}); start from the pretrained transformer"
        )
    base_channels = latent_channels(transformer)
    layout = LatentLayout(base_channels, operator.index(detail_channels))
    expanded = _shared_copy(transformer)
    for path, widen in ((family.embedder, widen_embedder), (family.head, widen_head)):
        if not isinstance(layer := expanded.get_submodule(path), nn.Linear | nn.Conv2d):
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise ValueError(f"layer {path} is a {kind}; unload its LoRA first, after fusing it where it shall stay")
        if layer.weight.is_meta and hasattr(layer, "_hf_hook"):  # a model on the meta device alone is a plan
            raise ValueError(f"layer {path} is offloaded, its weights on the meta device; expand before you offload")
        _replace(expanded, path, widen(layer, layout, family, new_weights))

    def widened(values: int) -> int:
        """Return values for all channels, with as many per channel as before (4 for 2x2 packing)."""
        return values // base_channels * layout.channels

    changes = {key: widened(config[key]) for key in (family.in_key, family.out_key) if config.get(key) is not None}
    expanded.register_to_config(**changes, **{MARK: base_channels})  # type: ignore[operator]
    for path in family.attributes:
        parent, _, attribute = path.rpartition(".")
        module = expanded.get_submodule(parent)
        setattr(module, attribute, widened(getattr(module, attribute)))
    if detail_offset:
        if family.detail_time is None:
            raise ValueError(f"all channels of a {family.class_name} share one time; leave detail_offset at 0")
        expanded.add_detail_time(layout.detail_channels)  # type: ignore[operator]
        expanded.register_to_config(**{OFFSET: float(detail_offset)})  # type: ignore[operator]
    return expanded


def latent_channels(transformer: nn.Module) -> int:
    """Return the channels of a transformer's latents, before its pipeline packs them."""
    family = family_of(transformer)
    return int(transformer.config[family.in_key]) // family.packed  # type: ignore[index]


def widen_embedder(embedder: nn.Module, layout: LatentLayout, family: Family, new_weights: NewWeights) -> nn.Module:
    """Return [P, P'], the pretrained patch embedder with D more input channels (Eq. 7-8)."""
    wide = _like(embedder, layout.channels / layout.base_channels, 1)
    with torch.no_grad():
        if new_weights == "zero":
            wide.weight.zero_()
        z, _ = layout.split(inputs_by_channel(wide.weight, layout.channels, family))
        z.copy_(inputs_by_channel(embedder.get_parameter("weight"), layout.base_channels, family))
        if embedder.bias is not None:
            wide.bias.copy_(embedder.bias)
    return wide


def widen_head(head: nn.Module, layout: LatentLayout, family: Family, new_weights: NewWeights) -> nn.Module:
    """Return [O, O'], the pretrained head with D more output channels per position (Eq. 10).

    A head that also predicts a variance has two groups of channels per position; both grow.
    """
    wide = _like(head, 1, layout.channels / layout.base_channels)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if new_weights == "zero":
                parameter.zero_()
            z, _ = layout.split(outputs_by_channel(parameter, layout.channels, family))
            z.copy_(outputs_by_channel(head.get_parameter(name), layout.base_channels, family))
    return wide


def _like(layer: nn.Module, inputs: float, outputs: float) -> Any:
    """Return a fresh layer of the same kind with `inputs` and `outputs` times the channels."""
    kept = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(round(layer.in_features * inputs), round(layer.out_features * outputs), **kept)
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(
        round(layer.in_channels * inputs),
        round(layer.out_channels * outputs),
        kernel_size=layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        **kept,
    )


def inputs_by_channel(weight: Tensor, channels: int, family: Family) -> Tensor:
    """Return a view of an embedder's weight as (width,c,...), or (p*p,c,width) for a linear."""
    if weight.ndim == 4:
        return weight.unflatten(1, (channels, family.packed))
    return by_channel(weight.T, weight.shape[1] // channels, channels, family.embedder_order)


def outputs_by_channel(parameter: Tensor, channels: int, family: Family) -> Tensor:
    """Return a view of a head's weight or bias as (p*p,c,...), 2*p*p with a variance."""
    return by_channel(parameter, parameter.shape[0] // channels, channels, family.head_order)


def by_channel(rows: Tensor, positions: int, channels: int, order: str) -> Tensor:
    """Return a view of a token's values as (p*p,channels,...), from either order of packing."""
    if order == "patch_channel":
        return rows.unflatten(0, (positions, channels))
    return rows.unflatten(0, (channels, positions)).transpose(0, 1)


def new_weight_masks(transformer: nn.Module) -> dict[str, Tensor]:
    """Return parameter name -> mask of the embedder and head, 1 in P' and O'.

    Raises:
        ValueError: a transformer that was not expanded.
    """
    family = family_of(transformer)
    config: Any = transformer.config
    if MARK not in config:
        raise ValueError(f"this {family.class_name} was not expanded; call expand_transformer first")
    layout = LatentLayout(config[MARK], latent_channels(transformer) - config[MARK])
    masks: dict[str, Tensor] = {}
    for path in (family.embedder, family.head):
        for name, parameter in transformer.get_submodule(path).named_parameters():
            mask = torch.zeros_like(parameter, requires_grad=False)
            if path == family.head:
                _, detail = layout.split(outputs_by_channel(mask, layout.channels, family))
                detail.fill_(1)
            elif parameter.ndim > 1:  # the embedder's bias belongs to P
                _, detail = layout.split(inputs_by_channel(mask, layout.channels, family))
                detail.fill_(1)
            masks[f"{path}.{name}"] = mask
    return masks


def _shared_copy(module: Model) -> Model:
    """Return a copy whose parameters and buffers are new objects over the same storage."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    for part in module.modules():  # accelerate's hooks for offloading hold other models
        memo[id(getattr(part, "_hf_hook", None))] = getattr(part, "_hf_hook", None)
    return copy.deepcopy(module, memo)


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
