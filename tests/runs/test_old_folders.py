"""Folders that davae wrote before it kept checksums and markers still open, resume and export.

`fixtures/run-of-0.1.0.tar.gz` was written by the code at commit dd4cddf: a tiny base, twelve images, a recipe, its finished
run (2 steps of stage 1, 3 of stage 2) and `davae export --as upgrade` of it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from test_training import run_cli, training_records

from davae import DetailVAE
from davae.pretrained.autoencoders import load_detail_vae
from davae.recipes.sections import Cache, Data
from davae.runs.cache import cache_key

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "run-of-0.1.0.tar.gz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds all of it, as the working directory: the recipe names its base and data without a path."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_run_is_left_as_it_is(old: Path):
    run = old / "run"
    kept = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    run_cli("upgrade", "tiny.yaml", "--out", "run")
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == kept
    vae = DetailVAE.from_pretrained(run / "vae")
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode().shape == (1, 12, 8, 8)
    pipeline = StableDiffusion3Pipeline.from_pretrained(run / "pipeline")
    image = pipeline("a red square", num_inference_steps=1, max_sequence_length=1).images[0]
    assert image.size == (32, 32)


def test_a_stopped_run_goes_on_to_the_same_weights(old: Path):
    run = old / "run"
    records, weights = training_records(run), load_file(run / "upgrade.safetensors")
    for folder in ("pipeline", "checkpoints/stage2-00000003"):
        shutil.rmtree(run / folder)
    for file in ("upgrade.safetensors", "checkpoints/stage2.done", "checkpoints/report.done"):
        (run / file).unlink()
    run_cli("train-dit", "tiny.yaml", "--out", "run")
    found = load_file(run / "upgrade.safetensors")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():  # another processor may round otherwise
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    again = training_records(run)
    for one, other in zip(again, records, strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert other.keys() <= one.keys()  # new figures may join, none is lost
        assert {key: one[key] for key in other} == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_the_key_of_a_cache_names_the_same_autoencoder(old: Path):
    """A cache of earlier versions would be stale otherwise; a decoder for previews encodes nothing."""
    opened = SimpleNamespace(source=None, train=[])
    data, cache = Data(source="x"), Cache(shards=str(old))
    vae = load_detail_vae(old / "run" / "vae")
    for _ in range(2):
        key = cache_key(vae, opened, data, cache, resolution=32, seed=0)  # type: ignore[arg-type]
        assert key["autoencoder"] == json.loads((old / "run" / "cache" / "key.json").read_text())["autoencoder"]
        vae.register_to_config(base_decoder_config={"width": 8})
        vae.base_decoder = torch.nn.Linear(1, 1)


def test_an_exported_upgrade_is_applied(old: Path):
    run_cli("apply", "exported", "--base", "base", "--out", "applied")
    found = load_file(old / "applied" / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = load_file(old / "run" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=2e-3, rtol=2e-3)  # stored in bfloat16
