"""Recipes of super-resolution networks, the baseline of Tab. S2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, model_validator

from davae.recipes.fields import Layers, Pixels, RecipeName, Scale, Section, Width
from davae.recipes.sections import Data, Optim, Run


class SuperResolution(Optim):
    """A small network that enlarges images, the baseline of Tab. S2."""

    channels: Width = Field(default=64, description="Channels of the network.")
    layers: Layers = Field(default=16, description="Layers of the network.")
    lambda_lpips: NonNegativeFloat = Field(default=0.1, description="Weight of the perceptual loss.")
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = Field(
        default="lite0", description="Network of the perceptual loss."
    )
    perceptual_weights: str | None = Field(
        default=None, description="A safetensors file with trunk and heads, where torchvision cannot download."
    )


class SuperResolutionRecipe(Section):
    """Train a super-resolution network on images alone: `davae train-sr`."""

    kind: Literal["super-resolution"] = Field(default="super-resolution", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    resolution: Pixels = Field(description="Side of the enlarged image in pixels.")
    scale: Scale = Field(default=2, description="How many times the side grows.")
    data: Data = Field(default=Data(), description="Images.")
    network: SuperResolution = Field(description="The network and its training.")
    run: Run = Field(default=Run(), description="Settings of the whole run.")

    @model_validator(mode="after")
    def _divides(self) -> SuperResolutionRecipe:
        if self.resolution % self.scale:
            raise ValueError(f"resolution {self.resolution} is not divisible by scale {self.scale}")
        return self
