"""Benchmarks measure what they say: rivals compute the same, tiles lose nothing, clocks take turns."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from conftest import tiny_autoencoder, tiny_upgrade_recipe
from diffusers import AutoencoderKL

from davae import DetailVAE
from davae.data.images import collate
from davae.lab.bench import clock
from davae.lab.bench.clock import Spread, added_memory, race, ratio
from davae.lab.bench.plain import explicit_attention, softmax_attention
from davae.lab.bench.sampling import bench_guidance
from davae.lab.bench.stages import bench_stage1, bench_stage2
from davae.lab.bench.tokens import shallow
from davae.lab.bench.vae import WAYS, Way, bench_vae, psnr_in_range
from davae.recipes import Recipe, validate
from davae.runs.upgrade import Upgrade
from davae.tasks.stage1 import Stage1Task
from davae.vae.strips import Rows, Statistics, decode_by_rows, encode_by_rows
from davae.vae.tiling import spans


def test_rivals_take_turns_and_the_first_round_is_left_out():
    order: list[str] = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times["a"].repeats == 2
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert ratio(Spread.of([4.0]), Spread.of([2.0])) == 2.0


def allocate(mebibytes: int):
    """Work that touches so much memory."""
    return lambda: torch.ones(mebibytes * 2**18).sum()


def test_memory_is_measured_without_linux_and_without_unix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(clock, "STATUS", tmp_path / "absent")
    assert clock._peak(reset=True) > 2**20
    source = Path(clock.__file__).parents[2]
    unix = re.compile(r"^(import|from) (fcntl|resource|pwd|grp|termios)\b", re.MULTILINE)
    needs = {file.relative_to(source).parts[0] for file in source.rglob("*.py") if unix.search(file.read_text())}
    assert needs == {"app"}  # which names the systems that it needs


def test_peak_memory_is_what_the_work_takes():
    found = added_memory(allocate, 256) / 2**20
    assert 250 < found < 300


def test_fewer_blocks_of_the_same_width():
    config = {"num_layers": 24, "attention_head_dim": 64, "dual_attention_layers": list(range(13))}
    assert shallow(config, 4) == {**config, "num_layers": 4, "dual_attention_layers": (0, 1)}
    assert shallow({"num_layers": 19, "num_single_layers": 38}, 3) == {"num_layers": 1, "num_single_layers": 2}
    assert shallow({"depth": 28}, 99) == {"depth": 28}
    with pytest.raises(ValueError, match="blocks cannot be counted"):
        shallow({"width": 1}, 2)


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_written_out_attention_is_torch_s(masked: str):
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    mask = {"none": None, "bool": torch.rand(5, 5) > 0.3, "float": torch.randn(5, 5, dtype=torch.float64)}[masked]
    if masked == "bool":
        mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(softmax_attention(q, k, v, attn_mask=mask), expected)
    before = F.scaled_dot_product_attention
    with explicit_attention():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)
    assert F.scaled_dot_product_attention is before


def tiny(base: Path, pictures: Path) -> Recipe:
    values = tiny_upgrade_recipe(base, pictures, stage2__accumulation=1)
    recipe = validate(values, "tiny")
    assert isinstance(recipe, Recipe)
    return recipe


def test_stage_1_and_its_plain_opponent_have_the_same_losses(tiny_base: Path, picture_folder: Path):
    figures = bench_stage1(tiny(tiny_base, picture_folder), steps=2, repeats=1)
    parts = figures["davae_parts_seconds"]
    assert set(parts) == {"data", "forward", "backward", "optimizer"}
    assert 0 < sum(parts.values()) < 1.1 * figures["davae_seconds"]["slowest"]
    assert figures["losses_compared"] == 3
    assert figures["largest_relative_loss_difference"] < 1e-4


def test_in_float64_the_opponent_goes_the_same_way(
    tiny_base: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Gradients and optimizer too: it never takes the trainer's weights. Losses are logged to eight digits."""
    make = Upgrade.stage1_task

    def in_float64(run: Upgrade) -> Stage1Task:
        task = make(run)
        task.vae.double()
        task.collate = lambda items: collate([{**item, "image": item["image"].double()} for item in items])
        return task

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(Upgrade, "stage1_task", in_float64)
    torch.set_default_dtype(torch.float64)
    try:
        figures = bench_stage1(tiny(tiny_base, picture_folder), steps=3, repeats=1, follow=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert figures["largest_relative_loss_difference"] < 1e-6


def test_stage_2_and_its_plain_opponent_have_the_same_losses(tiny_base: Path, picture_folder: Path):
    recipe = tiny(tiny_base, picture_folder)
    figures = bench_stage2(recipe, steps=2, repeats=1)
    assert figures["losses_compared"] == 3
    assert figures["largest_relative_loss_difference"] < 1e-4


def test_guidance_outside_its_interval_costs_nothing_and_changes_nothing():
    figures = bench_guidance(hidden_size=64, depth=1, grid=4, channels=4, num_steps=50, batch=2, repeats=1)
    assert figures["largest_relative_difference"] < 1e-5
    assert figures["bound"] == pytest.approx(98 / (98 - figures["unguided_steps"]))
    assert 20 <= figures["unguided_steps"] <= 24  # t < 0.2 is u < 0.4545 of 49 steps


def test_psnr_has_its_closed_form():
    assert psnr_in_range(torch.zeros(4), torch.full((4,), 0.2), 2.0) == pytest.approx(20.0)
    assert psnr_in_range(torch.zeros(4), torch.zeros(4), 2.0) == math.inf


# -- less memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(5, 60, 7))
@pytest.mark.parametrize("tile", [4, 10, 16])
@pytest.mark.parametrize("shared", [0, 2, 5])
@pytest.mark.parametrize("grain", [1, 2])
def test_tiles_cover_everything_and_overlap(length: int, tile: int, shared: int, grain: int):
    length -= length % grain
    side, starts = spans(length, tile, shared, grain)
    assert side <= max(tile, length if length <= tile else 0)
    assert starts[0] == 0
    assert starts[-1] + side == length
    possible = min(shared, tile // grain * grain - grain)
    for before, after in pairwise(starts):
        assert after % grain == 0
        assert before + side - after >= possible - grain + 1
        assert after > before


def kl_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


@pytest.mark.parametrize("pixels", [1, 700, 10**6])
def test_strips_of_rows_give_the_whole_picture(pixels: int):
    vae = kl_autoencoder()
    images, latents = torch.randn(2, 3, 72, 104), torch.randn(2, 4, 18, 26)
    with torch.no_grad():
        for rows, whole in (
            (encode_by_rows(vae.encoder, images, pixels), vae.encoder(images)),
            (decode_by_rows(vae.decoder, latents, pixels), vae.decoder(latents)),
        ):
            assert psnr_in_range(rows, whole, float(whole.max() - whole.min())) > 60


def test_rows_that_half_precision_cannot_hold():
    values = torch.tensor([1e-3, 1.0, 7e4, 3e8]).view(1, 1, 4, 1).expand(2, 3, 4, 5)
    kept = Rows.of(values.contiguous(), step=3)
    torch.testing.assert_close(kept.whole(), values, rtol=1e-3, atol=0.0)


def test_tiling_a_detail_vae_changes_nothing_that_is_seen():
    vae = DetailVAE.from_base(tiny_autoencoder(), 8).eval()
    images = F.interpolate(torch.rand(1, 3, 9, 9) * 2 - 1, (128, 192), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        whole = vae.decode(latents).sample
        vae.enable_tiling(32)
        assert (
            psnr_in_range(vae.encode(images).latent_dist.mode(), latents, float(latents.max() - latents.min())) > 45
        )
        assert psnr_in_range(vae.decode(latents).sample, whole, 2.0) > 45


def test_tiling_finds_weights_that_are_offloaded_layer_by_layer():
    """`enable_sequential_cpu_offload`: between calls a layer has no weights, and strips do without its calls."""
    vae = DetailVAE.from_base(tiny_autoencoder(), 8).eval()
    vae.enable_tiling(32)
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        whole = vae.decode(latents).sample
        cpu_offload(vae, torch.device("cpu"), offload_buffers=True)
        assert vae.decoder.conv_out.weight.is_meta
        assert torch.equal(vae.encode(images).latent_dist.mode(), latents)
        assert torch.equal(vae.decode(latents).sample, whole)
    assert vae.decoder.conv_out.weight.is_meta


@pytest.mark.parametrize("way", WAYS)
def test_bench_vae_measures_one_way_alone(way: Way, tmp_path: Path):
    DetailVAE.from_base(tiny_autoencoder(), 8).save_pretrained(tmp_path)
    figures = bench_vae(str(tmp_path), resolution=128, tile=32, repeats=1, ways=[way])
    assert [name for name in WAYS if name in figures] == [way]
    assert figures[way]["psnr"] > 45


def test_statistics_of_large_values_in_float16():
    """Squares of 1,000 are more than float16 holds; a group normalisation is not."""
    norm = torch.nn.GroupNorm(2, 4)
    x = 1000 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(norm)
    statistics.add(x.half())
    torch.testing.assert_close(statistics.change(torch.float32)(x), norm(x), atol=2e-2, rtol=0)
