"""P' and O': a transformer of the same class with D more channels in and out, the new weights zero (Eq. 7-11)."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.models.families import TransformerFamily, transformer_family

Model = TypeVar("Model", bound=nn.Module)
NewWeights = Literal["zero", "random"]
MARK = "_davae_base_channels"  # config key of an expanded transformer; diffusers keeps private keys silently


def expand_transformer(transformer: Model, detail_channels: int, new_weights: NewWeights = "zero") -> Model:
    """Widen a pretrained transformer from C to C+D latent channels.

    At step 0 the base velocity equals the pretrained one whatever the detail input (Eq. 9), and the detail velocity is zero
    (Eq. 11). Everything else is shared with `transformer` (same storage); its own embedder and head stay as they were.

    Args:
        transformer: a supported diffusers transformer with C input and C output channels.
        detail_channels: D, a multiple of C.
        new_weights: `random` gives P' and O' the initial values of a fresh layer instead: the ablation of Fig. 4.

    Returns:
        A module of the same class, `in_channels` and `out_channels` of its config raised by D.

    Raises:
        ValueError: unsupported class, D not a multiple of C, or a transformer that was expanded already.
    """
    family = transformer_family(type(transformer).__name__)
    config: Any = transformer.config
    if MARK in config:
        raise ValueError(
            f"this {family.class_name} was expanded already ({config[MARK]} base channels of {config['in_channels']}); "
            "start from the pretrained transformer"
        )
    base_channels = int(config["in_channels"])
    layout = LatentLayout(base_channels, detail_channels)
    expanded = _shared_copy(transformer)
    _replace(expanded, family.embedder, widen_embedder(expanded.get_submodule(family.embedder), layout, new_weights))
    _replace(expanded, family.head, widen_head(expanded.get_submodule(family.head), layout, family, new_weights))
    groups = (config["out_channels"] or base_channels) // base_channels  # 2 where a variance is returned
    expanded.register_to_config(  # type: ignore[operator]
        in_channels=layout.channels, out_channels=groups * layout.channels, **{MARK: base_channels}
    )
    for attribute in family.attributes:
        setattr(expanded, attribute, layout.channels)
    return expanded


def widen_embedder(embedder: nn.Module, layout: LatentLayout, new_weights: NewWeights) -> nn.Conv2d:
    """[P, P']: the pretrained patch convolution with D more input channels (Eq. 8)."""
    assert isinstance(embedder, nn.Conv2d)
    wide = nn.Conv2d(
        layout.channels,
        embedder.out_channels,
        kernel_size=embedder.kernel_size,  # type: ignore[arg-type]
        stride=embedder.stride,  # type: ignore[arg-type]
        padding=embedder.padding,  # type: ignore[arg-type]
        bias=embedder.bias is not None,
        device=embedder.weight.device,
        dtype=embedder.weight.dtype,
    )
    with torch.no_grad():
        if new_weights == "zero":
            wide.weight.zero_()
        z, _ = layout.split(wide.weight)  # (width,C,p,p), a view
        z.copy_(embedder.weight)
        if embedder.bias is not None:
            wide.bias.copy_(embedder.bias)  # type: ignore[union-attr]
    return wide


def widen_head(
    head: nn.Module, layout: LatentLayout, family: TransformerFamily, new_weights: NewWeights
) -> nn.Linear:
    """[O, O']: the pretrained head with D more output channels per patch position (Eq. 10).

    A head that also predicts a variance has two groups of channels per position; both grow.
    """
    assert isinstance(head, nn.Linear)
    positions = head.out_features // layout.base_channels  # p*p, times two with a variance
    wide = nn.Linear(
        head.in_features,
        positions * layout.channels,
        bias=head.bias is not None,
        device=head.weight.device,
        dtype=head.weight.dtype,
    )
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if new_weights == "zero":
                parameter.zero_()
            z, _ = layout.split(by_channel(parameter, positions, layout.channels, family.head_order))
            z.copy_(by_channel(head.get_parameter(name), positions, layout.base_channels, family.head_order))
    return wide


def by_channel(rows: Tensor, positions: int, channels: int, order: str) -> Tensor:
    """View of a head's rows as (p*p, channels, ...), whatever order its family packs them in."""
    if order == "patch_channel":
        return rows.unflatten(0, (positions, channels))
    return rows.unflatten(0, (channels, positions)).transpose(0, 1)


def new_weight_masks(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> mask, 1 where an expanded transformer's P' and O' are, for the embedder and head weights.

    Raises:
        ValueError: when the transformer was not expanded.
    """
    family = transformer_family(type(transformer).__name__)
    config: Any = transformer.config
    if MARK not in config:
        raise ValueError(f"this {family.class_name} was not expanded; call expand_transformer first")
    layout = LatentLayout(config[MARK], config["in_channels"] - config[MARK])
    masks: dict[str, Tensor] = {}
    for path in (family.embedder, family.head):
        for name, parameter in transformer.get_submodule(path).named_parameters():
            mask = torch.zeros_like(parameter, requires_grad=False)
            if path == family.head:
                positions = parameter.shape[0] // layout.channels
                _, detail = layout.split(by_channel(mask, positions, layout.channels, family.head_order))
                detail.fill_(1)
            elif parameter.ndim > 1:  # the embedder's bias belongs to P
                _, detail = layout.split(mask)
                detail.fill_(1)
            masks[f"{path}.{name}"] = mask
    return masks


def _shared_copy(module: Model) -> Model:
    """A copy whose parameters and buffers are new objects over the same storage."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, memo)


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
