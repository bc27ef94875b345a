"""Codec: one scale of latents for every autoencoder, and one place that divides by their standard deviation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_autoencoder
from test_autoencoders import BUILDERS, normalised

import davae
from davae import DetailVAE
from davae.latent import LatentStatistics
from davae.vae.base import base_channels, spatial_factor
from davae.vae.codec import Codec
from davae.vae.frames import decode_latents, encode_mode

SCALED = re.compile(r"(/ \(?(self\.)?([a-z_]*std|over_grid)\b)|\* (self\.)?[a-z_]*std\b.*\+ (self\.)?[a-z_]*mean\b")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_codec_is_the_scale_of_pipelines_around_any_autoencoder(name: str):
    vae = BUILDERS[name]()
    codec, kind = Codec(vae), type(vae).__name__
    assert (codec.factor, codec.channels) == (spatial_factor(vae.config, kind), base_channels(vae.config, kind))
    images = torch.rand(2, 3, 8 * codec.factor, 8 * codec.factor) * 2 - 1
    with torch.no_grad():
        raw, latents = codec.encode_raw(images), codec.encode(images)
        assert torch.equal(raw, encode_mode(vae, images))
        torch.testing.assert_close(latents, normalised(vae, raw).float())
        torch.testing.assert_close(codec.denormalise(codec.normalise(raw)), raw)
        assert torch.equal(codec.decode(latents), decode_latents(vae, codec.denormalise(latents)))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_codec_around_a_detail_vae_on_any_base(name: str):
    vae = DetailVAE.from_base(BUILDERS[name](), 8)
    vae.set_detail_statistics(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))
    codec = Codec(vae)
    assert (codec.factor, codec.channels) == (vae.spatial_factor, vae.layout.channels)
    images = torch.rand(2, 3, 4 * codec.factor, 4 * codec.factor) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(images)
        assert torch.equal(latents, vae.encode(images).latent_dist.mode())  # type: ignore[union-attr]
        assert torch.equal(latents, codec.normalise(codec.encode_raw(images)))
        assert torch.equal(codec.decode(latents), vae.decode(latents).sample)  # type: ignore[union-attr]
        assert torch.equal(codec.denormalise(latents), vae.denormalise(latents))


def test_statistics_of_a_cell_repeat_over_the_grid():
    mean, std = torch.arange(8.0).view(1, 2, 2, 2), torch.arange(1.0, 9.0).view(1, 2, 2, 2)
    statistics, latents = LatentStatistics(mean, std), torch.randn(3, 2, 3, 5)
    expected = torch.empty_like(latents)
    for row in range(3):
        for column in range(5):
            cell = (slice(None), slice(None), row % 2, column % 2)
            expected[:, :, row, column] = (latents[:, :, row, column] - mean[cell]) / std[cell]
    assert torch.equal(statistics.normalise(latents), expected)
    torch.testing.assert_close(statistics.denormalise(expected), latents)


def test_half_precision_decodes_in_the_autoencoders_own():
    vae: Any = tiny_autoencoder()
    vae.to(torch.bfloat16)
    assert Codec(vae).decode(torch.zeros(1, 4, 4, 4)).dtype == torch.bfloat16


def test_one_place_normalises_latents():
    """base_decoder holds a scale of its own as numbers: those of a tiny autoencoder's pixels, not of a transformer."""
    found = {
        str(path.relative_to(Path(davae.__file__).parent))
        for path in Path(davae.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if SCALED.search(line.split("#")[0]) and '"""' not in line
    }
    assert found == {"latent.py", "vae/base_decoder.py"}
