"""Discriminator: the smallest square, and widths that are not powers of two."""

from __future__ import annotations

import pytest
import torch

from davae.recipes.stages import Reconstruction
from davae.vae.discriminator import PatchDiscriminator


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_a_recipe_knows_the_smallest_square_that_passes(layers: int):
    network, least = PatchDiscriminator(4, layers), 3 * 2**layers
    settings = Reconstruction(max_steps=1, batch_size=1, lr=1e-4, gan_layers=layers, gan_start=0)
    settings.check_discriminator("vae", least)
    assert network(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, least - 1, least - 1))
    with pytest.raises(ValueError, match=rf"vae.gan_layers: {layers} layers need {least} pixels"):
        settings.check_discriminator("vae", least - 1)
    settings.model_copy(update={"gan_start": 2}).check_discriminator("vae", least - 1)  # it never takes part


@pytest.mark.parametrize("channels", [1, 3, 7, 25, 44, 64, 128])
def test_any_width_has_groups(channels: int):
    network = PatchDiscriminator(channels, 2)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 1, 2, 2)
    groups = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert [norm.num_groups for norm in groups if channels in (64, 128)] == [32] * (2 if channels in (64, 128) else 0)
