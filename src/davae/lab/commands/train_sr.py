"""`davae train-sr`: the super-resolution network that Tab. S2 compares with."""

from __future__ import annotations

from davae.commands.options import AllowCommands, Name, Out, Overrides, Source
from davae.commands.upgrade import read_typed, train


def train_sr(
    recipe: Name,
    out: Out = None,
    data: Source = None,
    set: Overrides = None,
    allow_commands: AllowCommands = False,
) -> None:
    """Train a super-resolution network, the baseline of Tab. S2: weights for `davae evaluate generation --upscale`.

    `davae train-sr imagenette128-sr --out runs/sr`
    """
    from davae.recipes import SuperResolutionRecipe

    resolved = read_typed(SuperResolutionRecipe, recipe, data, set)
    from davae.lab.super_resolution import train_super_resolution as run

    train(run, resolved, out)
