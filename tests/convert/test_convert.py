"""Official checkpoints: equal outputs, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from test_lightning_dit import random_model, small_autoencoder
from test_training import run_cli

from davae import DetailVAE, alignment_loss, group_mean
from davae.convert.checkpoints import load_state
from davae.convert.davae import official_davae
from davae.convert.lightningdit import convert_transformer, lightningdit, sit
from davae.convert.vavae import vavae
from davae.data.latent_cache.import_shards import import_shards
from davae.data.latent_cache.key import changes, hash_values
from davae.data.latent_cache.meta import seal
from davae.data.latent_cache.read import CachedLatents
from davae.errors import DataError, ModelError
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.open import load_pipeline
from davae.recipes.sections import Cache, Data
from davae.runs.cache import cache_key, check_shards


@pytest.fixture(scope="module")
def official(shared: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return read_official(shared)


def read_official(shared: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(config, weights, inputs and outputs) of the authors' DA-VAE."""
    with safe_open(shared / "fixtures/davae_official_a.safetensors", framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        config = json.loads(stream.metadata()["config"])
    weights = {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")}
    return config, weights, {n.removeprefix("io."): v for n, v in tensors.items() if n.startswith("io.")}


def tiny_vavae(shared: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(ddconfig, weights): the fixture's base encoder and decoder as a VA-VAE, with what its training adds."""
    config, weights, _ = read_official(shared)
    state = {n.replace("base_encoder.", "encoder."): v for n, v in weights.items() if n.startswith("base_encoder.")}
    state |= {n.removeprefix("da."): v for n, v in weights.items() if n.startswith("da.decoder.")}
    state |= {n.removeprefix("base_"): v for n, v in weights.items() if n.startswith("base_quant_conv.")}
    state |= {"post_quant_conv.weight": torch.eye(4).view(4, 4, 1, 1), "post_quant_conv.bias": torch.zeros(4)}
    state |= {"foundation_model.x": torch.zeros(1), "linear_proj.weight": torch.zeros(1)}
    return config["ddconfig_base"], state


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_official_davae_gives_the_same_outputs(official) -> None:
    config, weights, io = official
    vae = official_davae(weights, config)
    with torch.no_grad():
        raw = vae.encode_raw(io["x"])
        near(raw.z, io["z"])
        near(raw.mean, io["zd_mean"])
        near(raw.logvar, io["zd_logvar"])
        near(group_mean(raw.mean, 4), io["proj"])
        near(alignment_loss(raw.mean, raw.z), io["align_mse"])
        near(vae.decode_raw(vae.layout.join(raw.z, raw.mean)), io["reconstruction"])
        latents = vae.encode(io["x"]).latent_dist.mode()
        near(vae.decode(latents).sample, io["reconstruction"])
    assert torch.equal(latents, vae.layout.join(raw.z, raw.mean)), "no statistics: normalised by the identity"


def test_official_davae_through_the_command_line(official, tmp_path: Path) -> None:
    config, weights, io = official
    torch.save({"state_dict": {f"module.{n}": v for n, v in weights.items()}}, tmp_path / "da.ckpt")
    (tmp_path / "da.yaml").write_text(yaml.safe_dump({"model": {"params": config}}))
    statistics = {"mean": torch.arange(16.0).view(1, 16, 1, 1), "std": torch.full((1, 16, 1, 1), 2.0)}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    run_cli("convert", "davae", f"{tmp_path}/da.ckpt", "--config", f"{tmp_path}/da.yaml", "--out", f"{tmp_path}/vae",
            "--statistics", f"{tmp_path}/latents_stats.pt")  # fmt: skip
    vae = load_autoencoder(str(tmp_path / "vae"))
    with torch.no_grad():
        latents = vae.encode(io["x"]).latent_dist.mode()
        near(vae.decode(latents).sample, io["reconstruction"])
    near(latents * 2 + torch.arange(16.0).view(1, 16, 1, 1), torch.cat([io["z"], io["zd_mean"]], dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"align_method": "conv"}, "align_method is conv"),
        ({"da_mode": "joint"}, "da_mode is joint"),
        ({"base_embed_dim": 5}, "z_channels 4 and embed_dim 5 differ"),
    ],
)
def test_other_davae_configurations_are_refused(official, change: dict, message: str) -> None:
    config, weights, _ = official
    with pytest.raises(ModelError, match=message):
        official_davae(weights, {**config, **change})


def test_vavae(official, shared: Path, tmp_path: Path) -> None:
    _, _, io = official
    ddconfig, state = tiny_vavae(shared)
    torch.save({"state_dict": state}, tmp_path / "vavae.ckpt")
    (tmp_path / "v.yaml").write_text(yaml.safe_dump({"model": {"params": {"ddconfig": ddconfig}}}))
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 3.0)}, tmp_path / "latents_stats.pt")
    run_cli("convert", "vavae", f"{tmp_path}/vavae.ckpt", "--config", f"{tmp_path}/v.yaml", "--out", f"{tmp_path}/v",
            "--statistics", f"{tmp_path}/latents_stats.pt")  # fmt: skip
    vae = load_autoencoder(str(tmp_path / "v"))
    assert vae.config["latents_std"] == [3.0] * 4
    images = torch.nn.functional.interpolate(io["x"], (32, 32), mode="bicubic", align_corners=False)
    with torch.no_grad():
        near(vae.encode(images).latent_dist.mode(), io["z"])
        assert vae.decode(io["z"]).sample.shape == (2, 3, 32, 32)
    incomplete = {n: v for n, v in state.items() if "down.2.attn.0.q" not in n}
    with pytest.raises(ModelError, match=r"missing encoder.down_blocks.2.attentions.0.to_q"):
        vavae(incomplete, ddconfig)
    with pytest.raises(ModelError, match=r"unknown extra\.weight"):
        vavae({**state, "extra.weight": torch.zeros(1)}, ddconfig)
    assert vavae(state, ddconfig).config["scaling_factor"] == 1.0


# -- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["raw", "ema", "module", "safetensors"])
def test_every_way_of_saving_loads(wrap: str, tmp_path: Path) -> None:
    model = random_model(torch.float32, use_qknorm=True)
    state = model.state_dict()
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pt")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "ema":
        torch.save({"model": {n: torch.zeros_like(v) for n, v in state.items()}, "ema": state, "args": None}, path)
    else:
        torch.save({f"module.{n}": v for n, v in state.items()} if wrap == "module" else state, path)
    loaded = lightningdit(load_state(path))
    assert loaded.config["num_heads"] == 2
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_convert_makes_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small_autoencoder().save_pretrained(tmp_path / "vae")
    model = random_model(torch.float32)
    torch.save({"ema": model.state_dict()}, tmp_path / "w.pt")
    run_cli("convert", "lightningdit", f"{tmp_path}/w.pt", "--vae", f"{tmp_path}/vae", "--out", f"{tmp_path}/pipe")
    pipeline = load_pipeline(str(tmp_path / "pipe"))
    assert pipeline.config["timestep_shift"] == 0.3
    assert pipeline.config["cfg_channels"] == 3
    run_cli("sample", f"{tmp_path}/pipe", "2", "4", "--num", "2", "--steps", "3", "--out", f"{tmp_path}/samples")
    assert len(list((tmp_path / "samples").glob("*.png"))) == 5


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "DetailVAE"])
def test_convert_takes_autoencoders_of_every_class(kind: str, tmp_path: Path) -> None:
    vae: Any = DetailVAE.from_base(small_autoencoder(), 12)
    if kind == "AutoencoderKLWan":  # its channels are called z_dim
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    vae.save_pretrained(tmp_path / "vae")
    for channels in (16, 4):
        torch.save(random_model(torch.float32, in_channels=channels).state_dict(), tmp_path / f"{channels}.pt")
    out = convert_transformer("lightningdit", tmp_path / "16.pt", tmp_path / "pipe", str(tmp_path / "vae"), {})
    assert type(load_pipeline(str(out)).vae).__name__ == kind
    with pytest.raises(ModelError, match=r"takes 4 channels, the autoencoder .* gives 16"):
        convert_transformer("lightningdit", tmp_path / "4.pt", tmp_path / "other", str(tmp_path / "vae"), {})


def test_sit_and_repa(tmp_path: Path) -> None:
    plain = {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False, "learn_sigma": True, "patch_size": 2}
    state = random_model(torch.float32, **plain).state_dict()
    torch.save({"ema": {**state, "projectors.0.weight": torch.zeros(2)}}, tmp_path / "repa.pt")
    run_cli("convert", "sit", f"{tmp_path}/repa.pt", "--repa", "--set", "num_heads=2", "--out", f"{tmp_path}/repa")
    from davae import LightningDiT

    turned = LightningDiT.from_pretrained(tmp_path / "repa")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 4])
    with torch.no_grad():
        torch.testing.assert_close(turned(x, 1 - t, y).sample, -sit(state, num_heads=2)(x, t, y).sample)
    with pytest.raises(ModelError, match="num_heads cannot be read"):
        sit(state)


class Runs:
    """Pickled as a call of os.system."""

    def __reduce__(self):
        import os

        return os.system, ("touch davae-was-here",)


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ([], {"ema": Runs()}, "holds more than tensors"),
        ([], {"lr": 0.1}, "holds no state dict"),
        ([], {"encoder.conv_in.weight": torch.zeros(1)}, "no LightningDiT, DiT or SiT weights: missing x_embedder"),
        (["--set", "num_classes=1000"], None, "num_classes is 1000 in the config, the weights have 5"),
        (["--set", "input_size=16"], None, "input_size is 16 in the config, the weights have 8"),
        (["--set", "colour=blue"], None, "unexpected keyword argument 'colour'"),
        (["--set", "num_heads"], None, "--set takes name=value"),
        (["--vae", "nowhere"], None, "nowhere"),
    ],
)
def test_bad_checkpoints_exit_2(
    arguments: list[str], content: object, message: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.save(content or random_model(torch.float32).state_dict(), tmp_path / "w.pt")
    with pytest.raises(AssertionError, match="exited with 2"):
        run_cli("convert", "lightningdit", "w.pt", "--out", "out", *arguments)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "davae-was-here").exists()


def test_a_text_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("hello\n")
    with pytest.raises(ModelError, match=r"notes\.pt cannot be read"):
        load_state(tmp_path / "notes.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_numbers_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    save = torch.save if name.endswith(".pt") else save_file
    save({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, tmp_path / name)
    with pytest.raises(ModelError, match=f"{name}: b contains NaN"):
        load_state(tmp_path / name)
    save({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / name)
    assert load_state(tmp_path / name)["a"].float().tolist() == [1, 1]


def test_weights_that_miss_or_add_keys_are_named() -> None:
    state = random_model(torch.float32).state_dict()
    with pytest.raises(ModelError, match=r"missing blocks.1.mlp.w3.bias"):
        lightningdit({n: v for n, v in state.items() if n != "blocks.1.mlp.w3.bias"})
    with pytest.raises(ModelError, match=r"unknown head.weight"):
        lightningdit({**state, "head.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"t_embedder.mlp.2.bias is \(3,\), expected \(32,\)"):
        lightningdit({**state, "t_embedder.mlp.2.bias": torch.zeros(3)})


# -- latent shards ---------------------------------------------------------------------------------------------


def write_shards(
    folder: Path, channels: int = 4, stats: int | None = 4, labels: int = 5, flat: bool = False
) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    whole = {name: torch.randn(7, *(() if flat else (channels, 8, 8))) for name in ("latents", "latents_flip")}
    whole["labels"] = torch.arange(7) % labels
    for rank, rows in enumerate((slice(0, 4), slice(4, 7))):
        save_file(
            {n: v[rows].contiguous() for n, v in whole.items()},
            folder / f"latents_rank{rank:02d}_shard000.safetensors",
        )
    if stats:
        torch.save(
            {"mean": torch.zeros(1, stats, 1, 1), "std": torch.ones(1, stats, 1, 1)}, folder / "latents_stats.pt"
        )
    return whole


def test_shards_become_a_cache(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "shards", stats=None)
    options = {"channels": 4, "num_classes": 5, "key": {"data": "k"}, "dtype": "float32"}
    meta = import_shards(tmp_path / "shards", tmp_path / "cache", **options)
    seal(tmp_path / "cache", meta)
    cache = CachedLatents(tmp_path / "cache", "class")
    both = torch.cat([whole["latents"], whole["latents_flip"]])
    assert np.array_equal(np.stack([cache[(i, 0)][0] for i in range(len(cache))]), both.numpy())
    assert list(cache.conditions) == [*whole["labels"].tolist()] * 2
    torch.testing.assert_close(torch.tensor(meta.mean), both.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(meta.std), both.std((0, 2, 3), unbiased=False), atol=1e-6, rtol=1e-5)
    write_shards(tmp_path / "shards")
    assert import_shards(tmp_path / "shards", tmp_path / "cache", **options).std == [1.0] * 4, "the given statistics"


@pytest.mark.parametrize(
    ("shards", "channels", "message"),
    [
        ({"stats": 8}, 4, "has statistics of 8 channels, the latents have 4"),
        ({"channels": 8, "stats": 8}, 4, "holds latents of 8 channels, the model takes 4"),
        ({"labels": 7}, 4, "has class label 5, the model has 5 classes"),
        ({"flat": True}, 4, r"holds latents of shape \(4,\); expected \(images, channels, side, side\)"),
        (None, 4, "has no latent shards"),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, shards: dict | None, channels: int, message: str) -> None:
    if shards is not None:
        write_shards(tmp_path, **shards)
    with pytest.raises(DataError, match=message):
        import_shards(tmp_path, tmp_path / "c", channels=channels, num_classes=5, key={}, dtype="float32")
    assert not (tmp_path / "c").exists(), "found before the copy"


def test_shards_of_another_size_or_class_are_found_before_a_training(tmp_path: Path) -> None:
    write_shards(tmp_path, stats=None)
    cache = Cache(shards=str(tmp_path))
    check_shards(cache, 4, 8, 5)
    with pytest.raises(DataError, match="holds latents of 8x8, the model takes 16x16"):
        check_shards(cache, 4, 16, 5)
    with pytest.raises(DataError, match="has class label 4, the model has 4 classes"):
        check_shards(cache, 4, 8, 4)


def test_the_key_of_shards_changes_with_their_content(tmp_path: Path) -> None:
    vae, opened, found = small_autoencoder(), SimpleNamespace(source=None, train=[]), []
    data, cache = Data(source="x"), Cache(shards=str(tmp_path))
    for seed, mean in ((0, 0.0), (1, 0.0), (1, 1.0)):
        torch.manual_seed(seed)
        write_shards(tmp_path)
        torch.save({"mean": torch.full((4,), mean), "std": torch.ones(4)}, tmp_path / "latents_stats.pt")
        found.append(cache_key(vae, opened, data, cache, resolution=16, seed=0))  # type: ignore[arg-type]
    assert len({key["data"] for key in found}) == 3
    former = {"data": hash_values([(f.name, f.stat().st_size) for f in sorted(tmp_path.iterdir())])}
    for key in found:
        assert not changes({**key, **former}, key), "a cache of an earlier version opens"
    assert changes(found[0], found[1]) == ["the images or their captions"]
