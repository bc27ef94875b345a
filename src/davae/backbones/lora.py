"""LoRA files of a base, converted for its upgraded model.

Weights on P or O are padded with zeros to the new channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from davae.backbones.expand import MARK, inputs_by_channel, latent_channels, outputs_by_channel
from davae.backbones.families import family_of
from davae.backbones.family import Family
from davae.errors import ModelError
from davae.latent import LatentLayout

# peft's names, and those of older diffusers and kohya files
ADAPTER = re.compile(
    r"(?P<layer>.+)\.(?P<side>lora_[AB]|lora[._](?:down|up)|lora_linear_layer\.(?:down|up))(?:\.\w+)?\.(?P<kind>weight|bias)"
)
DOWN = re.compile(r"lora_A|.*down")


def widen_lora(state_dict: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """Return a LoRA of the pretrained model for the expanded one.

    Layers inside (attention, feed-forward) keep their tensors. On the embedder, A (r,C,...) grows to (r,C+D,...), on the
    head, B (p*p*C,r) to (p*p*(C+D),r), zeros in the new entries: the base part of the velocity changes as the pretrained
    model's does, the detail part not at all (Eq. 8, 10). Tensors that fit already are left alone.

    Args:
        state_dict: names as in the files of diffusers and peft, `transformer.`, `unet.` or nothing in front; those of text
            encoders pass through.
        transformer: the expanded transformer, on any device, also `meta`.

    Raises:
        ModelError: a transformer that was not expanded, a layer or a shape that it does not have, an adapter other than LoRA
            on its embedder or head.
    """
    family = family_of(transformer)
    config: Any = transformer.config
    if MARK not in config:
        raise ModelError(f"this {family.class_name} was not upgraded; a LoRA of it needs no widening")
    layout = LatentLayout(config[MARK], latent_channels(transformer) - config[MARK])
    prefix = re.compile(rf"(?:{family.component}|base_model\.model)\.")
    layers = dict(transformer.named_modules())
    widened: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        inside = prefix.sub("", name, count=1)
        if inside.startswith("text_encoder"):
            widened[name] = tensor
            continue
        match = ADAPTER.fullmatch(inside)
        if match is None:
            if inside.startswith((f"{family.embedder}.", f"{family.head}.")) and not inside.endswith(".alpha"):
                raise ModelError(
                    f"'{name}' is not a LoRA weight; on the embedder and head only plain LoRA can be widened"
                )
            widened[name] = tensor
            continue
        layer = layers.get(match["layer"])
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise ModelError(
                f"'{name}' adapts a layer that a {family.class_name} does not have: a LoRA of another model"
            )
        widened[name] = _fit(name, tensor, match, layer, layout, family)
    return widened


def _fit(
    name: str, tensor: Tensor, match: re.Match[str], layer: nn.Module, layout: LatentLayout, family: Family
) -> Tensor:
    """Return one tensor in the shape that the expanded layer needs."""
    down = bool(DOWN.fullmatch(match["side"]))
    axis = 1 if down else 0
    needed = layer.get_parameter("weight").shape[axis]
    if (down and match["kind"] == "bias") or tensor.shape[axis] == needed:
        return tensor
    by_channel, path = (inputs_by_channel, family.embedder) if down else (outputs_by_channel, family.head)
    pretrained = needed // layout.channels * layout.base_channels
    if match["layer"] != path or tensor.shape[axis] != pretrained:
        expected = f"{needed} (or {pretrained}, its base's)" if match["layer"] == path else str(needed)
        raise ModelError(
            f"'{name}' has shape {tuple(tensor.shape)}, but its axis {axis} must be {expected}: another model's LoRA"
        )
    shape = list(tensor.shape)
    shape[axis] = needed
    wide = tensor.new_zeros(shape)
    z, _ = layout.split(by_channel(wide, layout.channels, family))
    z.copy_(by_channel(tensor, layout.base_channels, family))
    return wide
