"""What an upgrade keeps of its base, and how hard a detail latent is to learn: closed forms on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from diffusers import PNDMScheduler
from safetensors.torch import save_file
from upgraded_tiny import assembled, upgraded

from davae.analyze import retention
from davae.analyze.diffusability import alignment_r2, base_leak, latent_measures, probe_loss
from davae.analyze.retention import LEVELS, check_pair, lora_effects, prediction_errors, retention_figure
from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.data.images import to_tensor
from davae.errors import ModelError
from davae.latent import LatentLayout
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import assemble
from davae.sample.open import SamplingOptions
from davae.vae.detail_vae import DetailVAE


@pytest.fixture(scope="module")
def base(tiny_base: Path):
    return load_pipeline(str(tiny_base))


def test_a_warm_start_keeps_everything_and_a_trained_one_less(base, tiny_base: Path):
    fresh = assemble(base, DetailVAE.from_base(base.vae, 8), expand_transformer(denoiser(base), 8))
    images = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(2)])
    kept = prediction_errors(base, fresh, images, ["a", "b"])
    assert [row["level"] for row in kept] == list(LEVELS)
    assert all(row["relative_error"] < 1e-8 and row["cosine"] > 0.9999 for row in kept)
    changed = prediction_errors(base, assembled(tiny_base), images, ["a", "b"])
    assert all(row["relative_error"] > 1e-4 for row in changed)


def test_the_report_compares_images_of_the_same_noise(base, tiny_base: Path, tmp_path: Path, picture_folder: Path):
    fresh = assemble(base, DetailVAE.from_base(base.vae, 8), expand_transformer(denoiser(base), 8))
    fresh.save_pretrained(tmp_path / "upgrade")
    done = retention_figure(
        str(tiny_base), str(tmp_path / "upgrade"), str(picture_folder), tmp_path / "figures",
        SamplingOptions(steps=2, guidance=1.0, batch_size=4), num=2, held_out=0.0, drawn=2,
        lora=base_lora(denoiser(base), tmp_path / "lora.safetensors"),
    )  # fmt: skip
    figures = json.loads(done.with_suffix(".json").read_text())
    assert figures["images"]["drawn"] == 2
    assert figures["images"]["lite0"] < 1e-3  # step 0: its base channels are the pretrained model's own
    assert len(figures["levels"]) == len(figures["lora"]["levels"]) == len(LEVELS)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_a_warm_start_keeps_everything_in_half_the_precision(name: str, tmp_path: Path):
    upgraded(name, tmp_path)
    base = load_pipeline(str(tmp_path / "base"), torch.bfloat16)
    fresh = assemble(base, DetailVAE.from_base(base.vae, 8), expand_transformer(denoiser(base), 8))
    assert (fresh.vae.dtype, denoiser(fresh).dtype) == (torch.bfloat16,) * 2
    images = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(2)])
    rows = prediction_errors(base, fresh, images, ["a", "b"])
    assert all(row["relative_error"] < 1e-3 and row["cosine"] > 0.999 for row in rows)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_the_base_of_a_warm_start_is_compared_at_the_end(name: str, tmp_path: Path):
    """Equal to the end, also of packed latents and of PNDM, which calls its model once more than it has steps."""
    upgraded(name, tmp_path)
    base = load_pipeline(str(tmp_path / "base"))
    if name == "UNet2DConditionModel":
        base.scheduler = PNDMScheduler.from_config(base.scheduler.config, skip_prk_steps=True)
    fresh = assemble(base, DetailVAE.from_base(base.vae, 8), expand_transformer(denoiser(base), 8))
    rows = retention._images_of_both(base, fresh, ["a", "b"], SamplingOptions(4, 1.0))
    first, second = (np.stack([np.asarray(image, int) for image in row]) for row in rows.values())
    assert np.abs(first - second).max() <= 1
    assert first.std() > 1


def base_lora(model, file: Path, scale: float = 0.5) -> Path:
    """Write a random LoRA of a base's attention, embedder and head."""
    generator, state = torch.Generator().manual_seed(1), {}
    for layer in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_out.0",
        "proj_out",
        "pos_embed.proj",
    ):
        out, *inside = model.get_submodule(layer).weight.shape
        for side, shape in (("A", (2, *inside)), ("B", (out, 2) + (1, 1) * (len(inside) > 1))):
            state[f"transformer.{layer}.lora_{side}.weight"] = scale * torch.randn(shape, generator=generator)
    save_file(state, file)
    return file


def test_a_lora_of_the_base_moves_a_warm_start_equally_and_a_trained_upgrade_otherwise(
    tiny_base: Path, tmp_path: Path
):
    images = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(2)])
    first, second = load_pipeline(str(tiny_base)), load_pipeline(str(tiny_base))
    file = base_lora(denoiser(first), tmp_path / "lora.safetensors")
    fresh = assemble(first, DetailVAE.from_base(first.vae, 8), expand_transformer(denoiser(first), 8))
    rows = lora_effects(second, fresh, images, ["a", "b"], file)
    assert [row["level"] for row in rows] == list(LEVELS)
    for row in rows:
        assert row["cosine"] > 0.9999
        assert row["ratio"] == pytest.approx(1, abs=1e-3)
        assert row["base_change"] == pytest.approx(row["upgrade_change"], rel=1e-3)
        assert row["base_change"] > 1e-2
    changed = lora_effects(load_pipeline(str(tiny_base)), assembled(tiny_base), images, ["a", "b"], file)
    assert all(row["cosine"] < 0.9999 for row in changed)


@pytest.mark.parametrize("part", [1, 2])
def test_parts_of_the_images_give_the_figures_of_the_whole(part: int, tiny_base: Path, tmp_path: Path):
    images, captions = torch.stack([to_tensor(picture(number, 32, 32)) for number in range(3)]), ["a", "b", "c d"]
    file = base_lora(denoiser(load_pipeline(str(tiny_base))), tmp_path / "lora.safetensors")
    rows = []
    for batch in (3, part):
        torch.manual_seed(0)  # weights of the detail
        pair = load_pipeline(str(tiny_base)), assembled(tiny_base)
        seen = [size_of_batches(model) for model in (denoiser(pair[0]), denoiser(pair[1]), pair[1].vae.base_encoder)]
        errors = prediction_errors(*pair, images, captions, batch=batch)
        rows.append([errors, lora_effects(*pair, images, captions, file, batch=batch)])
        assert [max(sizes) for sizes in seen] == [batch] * 3
    for whole, parts in zip(*rows, strict=True):
        for expected, found in zip(whole, parts, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def size_of_batches(model: torch.nn.Module) -> list[int]:
    """Return a list that grows by the batch of every tensor that a model is called with."""
    sizes: list[int] = []

    def note(module: torch.nn.Module, given: tuple, named: dict) -> None:
        sizes.append(max(len(value) for value in (*given, *named.values()) if isinstance(value, torch.Tensor)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("other", ["a layer", "a shape", "no LoRA"])
def test_a_lora_that_does_not_fit_is_found_before_the_work(
    other: str, tiny_base: Path, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    file, name = tmp_path / "other.safetensors", "transformer.transformer_blocks.0.attn.to_q"
    wrong = {"a layer": name.replace("s.0", "s.99"), "a shape": name, "no LoRA": name}[other]
    sides = ("lora_A", "lora_B") if other != "no LoRA" else ("first", "second")
    shapes = (2, 7), (7, 2)
    save_file({f"{wrong}.{side}.weight": torch.ones(shape) for side, shape in zip(sides, shapes, strict=True)}, file)
    assembled(tiny_base).save_pretrained(tmp_path / "upgrade")
    for work in ("real_pictures", "prediction_errors", "generate"):
        monkeypatch.setattr(retention, work, lambda *given, **named: pytest.fail("it had begun"))
    with pytest.raises(ModelError, match=r"--lora .*other\.safetensors: it does not fit this \w+: .+") as raised:
        retention_figure(
            str(tiny_base), str(tmp_path / "upgrade"), str(picture_folder), tmp_path / "figures",
            SamplingOptions(steps=2, batch_size=4), num=2, held_out=0.0, lora=file,
        )  # fmt: skip
    assert "\n" not in str(raised.value)


def test_a_pipeline_without_lora_files_is_found_before_the_work(tmp_path: Path):
    model = upgraded("HunyuanDiT2DModel", tmp_path)
    with pytest.raises(ModelError, match=r"a \w+ loads no LoRA files; leave it out"):
        check_pair(load_pipeline(str(tmp_path / "base")), model, tmp_path / "lora.safetensors")


def test_the_check_of_a_lora_leaves_both_models_as_they_were(tiny_base: Path, tmp_path: Path):
    pair = load_pipeline(str(tiny_base)), assembled(tiny_base)
    file, images = base_lora(denoiser(pair[0]), tmp_path / "lora.safetensors"), torch.zeros(1, 3, 32, 32)
    before = [{**denoiser(pipeline).state_dict()} for pipeline in pair], prediction_errors(*pair, images, ["a"])
    check_pair(*pair, file)
    for pipeline, state in zip(pair, before[0], strict=True):
        found = denoiser(pipeline).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    assert prediction_errors(*pair, images, ["a"]) == before[1]


def test_calls_of_other_settings_keep_each_other_s_figures(
    tiny_base: Path, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    models = {"base": load_pipeline(str(tiny_base)), "upgrade": assembled(tiny_base)}
    seen = [size_of_batches(denoiser(model)) for model in models.values()]
    monkeypatch.setattr(retention, "open_model", lambda name, placement: (models[name], tmp_path))
    monkeypatch.setattr(retention, "lora_effects", lambda *given: [])
    monkeypatch.setattr(retention, "perceptual_distances", lambda *given: {})
    file = base_lora(denoiser(load_pipeline(str(tiny_base))), tmp_path / "lora.safetensors")

    def drawn(**changes: Any) -> str:
        return retention_figure(
            "base", "upgrade", str(picture_folder), tmp_path / "figures", SamplingOptions(1, 1.0, batch_size=1),
            num=2, held_out=0.0, **{"drawn": 1, **changes},
        ).stem  # fmt: skip

    assert drawn() == drawn() == "retention"
    assert [max(sizes) for sizes in seen] == [1, 1]
    assert drawn(lora=file) == "retention-2"
    assert drawn(drawn=2) == "retention-3"
    assert drawn(lpips="alex") == "retention-4"
    assert drawn() == "retention"
    assert drawn(lora=file) == "retention-2"
    settings = json.loads((tmp_path / "figures" / "retention-2.json").read_text())["settings"]
    assert (settings["lora"], settings["drawn"], settings["lpips"]) == (str(file), 1, None)


def test_a_lora_without_effect_is_one_line(tiny_base: Path, tmp_path: Path):
    pair = load_pipeline(str(tiny_base)), assembled(tiny_base)
    file = base_lora(denoiser(pair[0]), tmp_path / "zero.safetensors", scale=0.0)
    with pytest.raises(ModelError, match=r"zero\.safetensors: it does not change the base's prediction"):
        lora_effects(*pair, torch.zeros(1, 3, 32, 32), ["a"], file)


def test_two_models_that_are_no_pair_are_one_line(base, tiny_base: Path):
    upgraded = assembled(tiny_base)
    with pytest.raises(ModelError, match="BASE: an upgraded model"):
        check_pair(upgraded, upgraded)
    with pytest.raises(ModelError, match="UPGRADE: no upgraded model"):
        check_pair(base, base)


def test_alignment_is_one_for_a_linear_detail_and_nothing_for_noise():
    z, noise = torch.randn(16, 2, 8, 8), torch.randn(16, 4, 8, 8)
    linear = torch.cat([2 * z, z.flip(1) - 1], dim=1)
    assert alignment_r2(z, linear) > 0.999
    assert abs(alignment_r2(z, noise)) < 0.1
    found = latent_measures(z, linear)
    assert found["detail"]["effective_dimension"] == pytest.approx(
        2, abs=0.1
    )  # four channels, two of them independent
    assert found["detail"]["channel_correlation"] == pytest.approx(1 / 3, abs=0.05)
    assert latent_measures(z, noise)["detail"]["effective_dimension"] == pytest.approx(4, abs=0.1)


def test_the_probe_learns_a_constant_detail_and_not_noise():
    layout = LatentLayout(2, 4)
    smooth = torch.randn(16, 4, 1, 1).expand(-1, -1, 8, 8)
    z = torch.randn(16, 2, 8, 8)
    easy = probe_loss(z, smooth, layout, 60)
    hard = probe_loss(z, torch.randn(16, 4, 8, 8), layout, 60)
    assert easy["detail"] < 0.8 * hard["detail"]
    assert probe_loss(z, smooth, layout, 5) == probe_loss(z, smooth, layout, 5)  # the seed decides


def test_a_detail_that_repeats_the_base_gives_it_away_and_less_where_it_is_smaller():
    torch.manual_seed(0)
    layout = LatentLayout(2, 6)
    z = torch.randn(64, 2, 8, 8)
    copies = z.repeat(1, 3, 1, 1) + 0.3 * torch.randn(64, 6, 8, 8)
    found = base_leak(z, copies, layout)
    # unit variance at level s alone leaves 1 / ((1-s)^2 + s^2); three near copies halve that and more at middle levels
    assert 1.3 < found["alone"] < 1.8
    assert found["c=1"] > 0.3
    assert found["c=1"] > found["c=0.5"] > found["c=0.25"] > 0.01
    apart = base_leak(z, torch.randn(64, 6, 8, 8), layout)
    assert all(abs(value) < 0.01 for name, value in apart.items() if name != "alone")
