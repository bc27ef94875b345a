"""Options of an upgrade's detail rows, and how an expanded transformer gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from davae.backbones.detail_head import DetailHead, DetailPrediction
from davae.backbones.expand import MARK, latent_channels
from davae.backbones.families import family_of, supported
from davae.backbones.family import Family
from davae.errors import ModelError

BUFFERS = "detail_head."  # in front of their names; an upgrade file holds them next to what was trained


class HeadSettings(Protocol):
    """`stage2.linear_skip` and `stage2.detail_prediction` of a recipe."""

    @property
    def linear_skip(self) -> bool: ...

    @property
    def detail_prediction(self) -> str: ...


@dataclass(frozen=True)
class HeadOptions:
    """Options of a `DetailHead`, falsy where it has nothing to do."""

    linear_skip: bool = False
    prediction: DetailPrediction = "velocity"

    @classmethod
    def of(cls, settings: HeadSettings) -> HeadOptions:
        """Return the options that a recipe's stage 2 has."""
        return cls(settings.linear_skip, "x0" if settings.detail_prediction == "x0" else "velocity")

    def __bool__(self) -> bool:
        return self != HeadOptions()

    @classmethod
    def read(cls, values: Any) -> HeadOptions:
        """Return the options of plain values, as `values` gives them.

        Raises:
            ValueError: anything else.
        """
        if not isinstance(values, dict) or values.keys() - asdict(cls()).keys():
            raise ValueError(f"detail_head is {str(values)[:80]}")
        options = cls(**values)
        if type(options.linear_skip) is not bool or options.prediction not in get_args(DetailPrediction):
            raise ValueError(f"detail_head is {str(values)[:80]}")
        return options

    def values(self) -> dict[str, Any]:
        """Return plain values for a config or an upgrade file."""
        return asdict(self)


def check_family(family: Family, options: HeadOptions) -> None:
    """Refuse a `DetailHead` in a class of another library.

    Raises:
        ModelError: names the class and those that have one.
    """
    if options and not family.detail_head:
        own = ", ".join(one.class_name for one in supported() if one.detail_head)
        raise ModelError(
            f"a {family.class_name} is a class of diffusers, whose forward pass davae does not change; a linear skip and x0 "
            f"prediction of the detail need davae's own {own}"
        )


def attach_head(transformer: nn.Module, options: HeadOptions) -> None:
    """Give an expanded transformer a `DetailHead`, in place, where the options need one.

    Its linear skip starts with the moments of a standard normal.

    Args:
        transformer: on any device, also `meta`.
        options: of the head.

    Raises:
        ModelError: a class that takes none.
        ValueError: a model that predicts epsilon.
    """
    if not options:
        return
    check_family(family_of(transformer), options)
    config: Any = transformer.config
    if config["prediction_type"] != "velocity":
        raise ValueError(
            f"a model that predicts {config['prediction_type']} has no detail_head; it is for velocities"
        )
    settings = {"base_channels": config[MARK], **options.values()}
    with torch.device(transformer.device):  # type: ignore[arg-type]
        transformer.detail_head = DetailHead(latent_channels(transformer), **settings)
    transformer.register_to_config(head_options=settings)  # type: ignore[operator]


def set_skip_moments(transformer: nn.Module, mean: Tensor, covariance: Tensor) -> None:
    """Set the moments of [z, z_d] at one position from which a linear skip predicts.

    Args:
        transformer: with a linear skip.
        mean: (C+D,), of normalised latents.
        covariance: (C+D,C+D), in float64.
    """
    head: Any = transformer.detail_head
    head.linear.set_moments(mean, covariance)


def upgrade_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Return an upgrade file's tensors: trained parameters, and buffers of the detail head."""
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in transformer.named_buffers() if name.startswith(BUFFERS)}


def in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an upgrade file's tensors in a precision, buffers of the detail head in their own."""
    return {
        name: tensor.detach() if name.startswith(BUFFERS) else tensor.detach().to(dtype)
        for name, tensor in tensors.items()
    }
