"""Where a distance comes from: parts that sum, and sets that differ by one step each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import picture
from upgraded_tiny import assembled

from davae import DetailVAE
from davae.analyze.gap import (
    DECODER,
    DETAIL,
    NO_DETAIL,
    PARTS,
    REAL,
    SAMPLES,
    SAMPLES_UNPOLISHED,
    UNPOLISHED,
    _samples,
    _sets,
    decoder_before_polish,
    gap_figure,
    gap_parts,
    polish_gain,
)
from davae.data.images import to_tensor
from davae.errors import ModelError
from davae.sample.open import SamplingOptions

OPTIONS = SamplingOptions(2, 1.0, 0, batch_size=4)


def test_parts_and_floor_sum_to_the_distance_of_samples():
    distances = {REAL: 50.0, DECODER: 70.0, DETAIL: 65.0, SAMPLES: 120.0, NO_DETAIL: 140.0}
    parts = gap_parts(distances)
    assert parts == {"floor": 50.0, "decoder": 20.0, "detail": -5.0, "base": 55.0}
    assert sum(parts.values()) == distances[SAMPLES]
    assert set(parts) == {"floor", *PARTS}


def test_the_gain_of_a_polish_is_by_how_much_it_lowers_a_distance():
    distances = {DECODER: 70.0, UNPOLISHED: 71.0, SAMPLES: 120.0, SAMPLES_UNPOLISHED: 150.0}
    assert polish_gain(distances) == {DECODER: 1.0, SAMPLES: 30.0}


def test_both_decoders_of_a_polished_run_decode_the_same_latents(tiny_base: Path, tmp_path: Path):
    pipe, options = assembled(tiny_base), SamplingOptions(2, 1.0, 0, batch_size=2)
    assert decoder_before_polish(tmp_path, pipe.vae) is None
    pipe.vae.save_pretrained(tmp_path / "vae")
    assert decoder_before_polish(tmp_path, pipe.vae) is None
    with torch.no_grad():
        pipe.vae.last_decoder_weight.mul_(0.5)
    pipe.vae.set_detail_statistics(torch.ones(8), torch.full((8,), 2.0))
    pipe.vae.save_pretrained(tmp_path / "polished")
    before = decoder_before_polish(tmp_path, pipe.vae)
    assert isinstance(before, DetailVAE)
    assert torch.equal(before.statistics.std, pipe.vae.statistics.std), "of the pipeline, whose latents it decodes"
    real = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(3)])
    sets = _sets(pipe, real, ["a", "b", "c"], options, before)
    assert list(sets) == [REAL, DECODER, DETAIL, SAMPLES, NO_DETAIL, UNPOLISHED, SAMPLES_UNPOLISHED]
    for name, unpolished in ((DECODER, UNPOLISHED), (SAMPLES, SAMPLES_UNPOLISHED)):
        assert not torch.equal(sets[name], sets[unpolished])
        doubled = 2 * sets[name]  # but for the bias of the last layer, and where either is clamped
        inside = (sets[unpolished].abs() < 1) & (doubled.abs() < 1)
        bias = pipe.vae.decoder.conv_out.bias.detach().view(1, 3, 1, 1).expand_as(doubled)
        torch.testing.assert_close((doubled - bias)[inside], sets[unpolished][inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sets[UNPOLISHED], before(real).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_samples_without_detail_have_the_mean_detail_and_the_same_base(tiny_base: Path):
    pipe = assembled(tiny_base)
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, *args, **options: (seen.append(latents), decode(latents, *args, **options))[1]
    whole, without = _samples(pipe, ["a", "b", "c"], SamplingOptions(2, 1.0, 0, batch_size=2))
    assert whole.shape == without.shape == (3, 3, 32, 32)
    assert not torch.equal(whole, without)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        (z, z_d), (same, none) = pipe.vae.layout.split(first), pipe.vae.layout.split(second)
        assert torch.equal(z, same)
        assert z_d.abs().max() > 0
        assert not none.any()


def test_the_figure_compares_all_sets_with_the_training_images(tiny_base: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    for number in range(16):
        picture(number, 40, 40).save(tmp_path / "images" / f"{number:02d}.png")
        (tmp_path / "images" / f"{number:02d}.txt").write_text(f"image {number}")
    assembled(tiny_base).save_pretrained(tmp_path / "upgrade")
    model, data = str(tmp_path / "upgrade"), str(tmp_path / "images")
    done = gap_figure(model, data, tmp_path / "out", OPTIONS, num=8, held_out=0.5, patch_size=16)
    figures = json.loads(done.with_suffix(".json").read_text())
    assert list(figures["rows"]) == [REAL, DECODER, DETAIL, SAMPLES, NO_DETAIL]
    assert set(figures["parts"]) == {"fd_lite0", "patch_fd_lite0"}
    for key, parts in figures["parts"].items():
        assert sum(parts.values()) == pytest.approx(figures["rows"][SAMPLES][key])
    assert (tmp_path / "out" / "gap-images.png").is_file()
    with pytest.raises(ModelError, match=r"--held-out 0.1: . images, at least"):
        gap_figure(model, data, tmp_path / "out", OPTIONS, num=8, held_out=0.1)
    with pytest.raises(
        ModelError, match="--held-out 0: the images of the training would be compared with themselves"
    ):
        gap_figure(model, data, tmp_path / "out", OPTIONS, num=8, held_out=0.0)
