"""Folders as others write them: without a text encoder, in half precision alone, in the hub's cache, a single file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_autoencoder
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from transformers import CLIPTokenizer

from davae.backbones.classes_by_name import model_class
from davae.backbones.families import supported
from davae.errors import ModelError
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.open import load_part, load_pipeline, read_config
from davae.pretrained.processors import load_processor
from davae.pretrained.shapes import read_shapes
from davae.pretrained.stored import stored_variants
from davae.pretrained.text_encoders import load_text_encoders, reads_silent_t5
from davae.sample.fingerprint import model_fingerprint


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "model")


def test_stable_diffusion_3_without_its_third_text_encoder(model: Path):
    index = json.loads((model / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        index[part] = [None, None]
        shutil.rmtree(model / part)
    (model / "model_index.json").write_text(json.dumps(index))
    assert reads_silent_t5(str(model))
    assert load_pipeline(str(model)).text_encoder_3 is None
    encoders = load_text_encoders(str(model), "transformer", read_config(str(model), "transformer"))
    assert encoders.tokenizer_3 is None
    assert encoders.encode_prompt("a red square", None, None)[0].isfinite().all()


@pytest.mark.parametrize(("shards", "files"), [("1GB", 0), ("20KB", 4)])
def test_weights_in_half_precision_alone(model: Path, shards: str, files: int):
    expected = load_pipeline(str(model)).to(torch.float16)
    for file in model.glob("*/*.safetensors"):
        file.unlink()
    expected.save_pretrained(model, variant="fp16", max_shard_size=shards)
    assert len(list(model.glob("*/*.index.fp16.json"))) == files
    found = load_pipeline(str(model))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        first, second = (getattr(pipeline, part).float().state_dict() for pipeline in (found, expected))
        assert all(torch.equal(first[name], second[name]) for name in second)
    assert load_autoencoder(str(model)).dtype == torch.float32


def cached(home: Path, commit: str, *refs: str) -> Path:
    """Return the folder of a commit in the hub's cache, which branches or tags name."""
    (home / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (home / "refs" / ref).write_text(commit * 40)
    return home / "snapshots" / (commit * 40)


def test_a_hub_model_of_a_revision_in_half_precision_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The newest commit in the cache is another model; the branch v1 has fp16 files alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "models--a--b"
    expected = load_pipeline(str(model)).to(torch.float16)
    expected.save_pretrained(cached(home, "5", "v1"), variant="fp16")
    tiny_autoencoder().save_pretrained(cached(home, "6", "main") / "vae")
    index = read_config("a/b@v1", "", "model_index.json")
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    with pytest.raises(ModelError):
        read_config("a/b", "", "model_index.json")
    found = load_pipeline("a/b@v1")
    parts = {"text_encoder_3": found.text_encoder_3, "vae": load_autoencoder("a/b@v1")}
    parts["transformer"] = load_part("a/b@" + "5" * 40, "transformer", index["transformer"][1])
    for name, part in parts.items():
        second = getattr(expected, name).float().state_dict()
        assert all(torch.equal(tensor.float(), second[key]) for key, tensor in part.state_dict().items()), name
    assert load_processor("a/b@v1", CLIPTokenizer, "tokenizer", "tokenizer")("a red square")["input_ids"]
    assert reads_silent_t5("a/b@v1") is reads_silent_t5(str(model))
    assert model_fingerprint(["a/b@v1"]) == model_fingerprint(["a/b@v1"]) != model_fingerprint([str(model)])
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        read_config("a/b@v2", "", "model_index.json")


def test_the_hub_is_asked_for_a_revision_and_for_half_precision_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[Any, ...]] = []
    plain = load_pipeline(str(model))
    plain.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    names = [file.relative_to(tmp_path / "half").as_posix() for file in (tmp_path / "half").rglob("*.*")]
    # a part that is left out has both
    names += ["transformer/diffusion_pytorch_model.safetensors"]

    def listed(name: str, revision: str | None = None) -> list[str]:
        asked.append((name, revision))
        return names

    def download(name: str, revision: str | None = None, variant: str | None = None, **options: Any) -> str:
        asked.append((name, revision, variant))
        return str(tmp_path / "half")

    def fetched(name: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        assert (name, options["revision"]) == ("a/b", "refs/pr/1")
        return str(tmp_path / "half" / (subfolder or "") / filename)

    for module in ("davae.pretrained.stored", "davae.pretrained.open"):
        monkeypatch.setattr(f"{module}.hub_answers", lambda: True)
    monkeypatch.setattr("davae.pretrained.stored.list_repo_files", listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr(type(plain), "download", download)
    assert load_pipeline("a/b@refs/pr/1", without=("transformer",)).transformer is None
    assert asked == [("a/b", "refs/pr/1"), ("a/b", "refs/pr/1", "fp16")]
    assert stored_variants("a/b", ["transformer", "vae", "tokenizer"]) == {"transformer": None, "vae": "fp16"}


def test_one_part_in_half_precision_alone_leaves_the_others_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """diffusers downloads fp16 files of every part that has any, once it is asked for them."""
    hub, home = tmp_path / "hub", tmp_path / "home"
    plain = load_pipeline(str(model))
    plain.save_pretrained(hub)
    plain.to(torch.float16).save_pretrained(hub, variant="fp16")
    (hub / "text_encoder_2" / "model.safetensors").unlink()  # the one that exists as fp16 alone
    names = [file.relative_to(hub).as_posix() for file in hub.rglob("*.*")]

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, home / file)
        return str(home)

    def fetched(name: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        return "" if subfolder else str(shutil.copy(hub / filename, home))

    home.mkdir()
    for module in ("davae.pretrained.stored", "davae.pretrained.open"):
        monkeypatch.setattr(f"{module}.hub_answers", lambda: True)
    monkeypatch.setattr("davae.pretrained.stored.list_repo_files", lambda name, revision: names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    theirs = "diffusers.pipelines.pipeline_utils"
    monkeypatch.setattr(f"{theirs}.hf_hub_download", fetched)
    monkeypatch.setattr(f"{theirs}.snapshot_download", snapshot)
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(f"{theirs}.model_info", lambda *args, **options: SimpleNamespace(siblings=siblings))
    found = load_pipeline("a/b")
    loaded = {file.relative_to(home).as_posix() for file in home.rglob("*.safetensors")}
    assert {name for name in loaded if ".fp16." in name} == {"text_encoder_2/model.fp16.safetensors"}
    original = load_pipeline(str(model))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        first, second = (getattr(pipeline, part).state_dict() for pipeline in (found, original))
        assert all(torch.equal(first[name], second[name]) for name in second), part


def test_an_autoencoder_of_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, part in (("pipeline", "vae"), ("plain", "")):
        home = tmp_path / f"models--a--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("5" * 40)
        tiny_autoencoder().save_pretrained(home / "snapshots" / ("5" * 40) / part)
        assert read_config(f"a/{name}", part)["latent_channels"] == 4
        assert load_autoencoder(f"a/{name}").config.latent_channels == 4
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        load_autoencoder("a/none")


def test_a_single_file_is_named_as_one(tmp_path: Path):
    file = tmp_path / "sd35.safetensors"
    file.write_bytes(b"x")
    for load in (load_pipeline, load_autoencoder):
        with pytest.raises(ModelError, match=r"sd35\.safetensors is a single file, .*from_single_file\("):
            load(str(file))


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", "Popen"])
def test_a_model_that_draws_from_images_is_refused_before_any_work(model: Path, pipeline: str):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    assert read_shapes(str(model), to_train=False).pipeline_class == pipeline
    with pytest.raises(ModelError, match=rf"is a {pipeline}, .*\(StableDiffusion3Pipeline\); .*correct _class_name"):
        read_shapes(str(model))


def test_pipelines_of_the_families_exist():
    for name in (name for family in supported() for name in (family.pipeline, *family.variants)):
        assert issubclass(model_class(name), DiffusionPipeline)
