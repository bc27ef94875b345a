"""Kept images are those of the same prompts, settings and weights; images that are not finite are named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from davae.data.prompts import read_prompts
from davae.errors import DataError, ModelError, RunError
from davae.evaluate import prompts as prompting
from davae.evaluate.reconstruction import score_reconstructions
from davae.evaluate.sample_file import write_samples
from davae.files.ownership import only_writer
from davae.pretrained.open import load_pipeline
from davae.sample import fingerprint as hashing
from davae.sample import make_data as synthesis
from davae.sample.fingerprint import model_fingerprint
from davae.sample.finite import checked_decoding
from davae.sample.generate import generate
from davae.sample.image_folder import sample_to_folder
from davae.sample.open import SamplingOptions


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that hashes like a pipeline's; what draws is replaced."""
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "davae-cache"))
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    save_file({"w": torch.zeros(3)}, folder / "vae" / "w.safetensors")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that were drawn, each as an image of its length."""
    texts: list[str] = []

    def draw(pipeline: Any, prompts: list[str], how: SamplingOptions, **options: Any) -> list[Image.Image]:
        texts.extend(prompts)
        return [Image.new("RGB", (8, 8), (len(prompt), 0, 0)) for prompt in prompts]

    for module in (prompting, synthesis):
        monkeypatch.setattr(module, "generate", draw)
        monkeypatch.setattr(module, "open_text_model", lambda name, placement: name)
    return texts


def make_data(model: Path, prompts: Path, out: Path, **changes: Any) -> None:
    options = {"num": None, "shard_size": 2, "image_format": "png", "on_image": lambda done, total: None}
    how = replace(SamplingOptions(steps=2, guidance=2.0, seed=7, resolution=8, batch_size=2), **changes)
    synthesis.draw_training_set(str(model), prompts, out, how, **options)


def evaluate(model: Path, prompts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options = {"num": None, "clip": None, "on_batch": lambda done, total: None}
    how = replace(SamplingOptions(steps=1, guidance=1.0, seed=0), **changes)
    return prompting.evaluate_prompts(str(model), prompts, out, how, **options)


@pytest.mark.parametrize("verb", [make_data, evaluate])
def test_kept_images_are_of_the_same_prompts_and_weights(verb: Any, model: Path, tmp_path: Path, drawn: list[str]):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\n")
    verb(model, prompts, out)
    assert drawn == ["one", "two", "three"]
    verb(model, prompts, out)
    moved = shutil.copytree(model, tmp_path / "moved")
    (moved / "README.md").write_text("a card changes no image")
    verb(moved, shutil.copy(prompts, tmp_path / "same.txt"), out)
    assert len(drawn) == 3, "resumed at once"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".json"}

    prompts.write_text("one\nTWO\nthree\n")
    with pytest.raises(ModelError, match=r"images of other settings \(the prompts changed\)"):
        verb(model, prompts, out)
    prompts.write_text("one\ntwo\nthree\n")
    save_file({"w": torch.ones(3)}, model / "vae" / "w.safetensors")  # the same size: trained on
    with pytest.raises(ModelError, match=r"images of other settings \(the weights changed\)"):
        verb(model, prompts, out)
    with pytest.raises(ModelError, match="steps: "):
        verb(moved, prompts, out, steps=9)
    assert len(drawn) == 3
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.name in before}


@pytest.mark.parametrize("verb", [make_data, evaluate])
def test_what_davae_did_not_draw_is_never_taken_for_drawn(verb: Any, model: Path, tmp_path: Path, drawn: list[str]):
    (tmp_path / "p.txt").write_text("one\n")
    for name in ("00000.tar", "00000.png", "thesis.txt"):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(RunError, match=r"and no settings\.json; use another --out"):
            verb(model, tmp_path / "p.txt", out)
        assert [path.name for path in out.iterdir()] == [name]
    for text in ("{", "[]"):
        (out / "settings.json").write_text(text)
        with pytest.raises(RunError, match=r"settings\.json"):
            verb(model, tmp_path / "p.txt", out)
    with pytest.raises(RunError, match="is a file"):
        verb(model, tmp_path / "p.txt", tmp_path / "p.txt")
    (tmp_path / "busy").mkdir()
    with only_writer(tmp_path / "busy"), pytest.raises(RunError, match="another davae process writes here"):
        verb(model, tmp_path / "p.txt", tmp_path / "busy")
    assert not drawn


def test_folders_of_a_davae_without_fingerprints_resume(
    model: Path, tmp_path: Path, drawn: list[str], caplog: pytest.LogCaptureFixture
):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\n")
    make_data(model, prompts, out)
    values = json.loads((out / "settings.json").read_text())
    former = {"model": values["model"], "prompts": values["prompt_file"]}
    former |= {name: v for name, v in values.items() if name not in (*former, "weights", "prompt_file")}
    (out / "settings.json").write_text(json.dumps(former, indent=2) + "\n")
    (out / "00001.tar").unlink()
    (out / ".00001").mkdir()
    (out / ".00001" / "00000002.png").write_bytes(b"of whatever prompt")
    make_data(model, prompts, out)
    assert drawn[3:] == ["three"], "loose images of unknown prompts are drawn again"
    assert "kept no fingerprint of the weights" in caplog.text
    (out / "settings.json").write_text(json.dumps(former, indent=2) + "\n")
    prompts.write_text("one\nTWO\nthree\n")
    with pytest.raises(ModelError, match="other prompts"):
        make_data(model, prompts, out)


def test_a_fingerprint_is_of_names_and_content(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = [model_fingerprint([str(model)])]
    for change in ("config", "name", "weight"):
        if change == "config":
            (model / "model_index.json").write_text('{"a": 1}')
        elif change == "name":
            (model / "vae" / "w.safetensors").rename(model / "vae" / "v.safetensors")
        else:
            state = (model / "vae" / "v.safetensors").read_bytes()
            about = (model / "vae" / "v.safetensors").stat()
            (model / "vae" / "v.safetensors").write_bytes(state[:-1] + b"\x01")
            os.utime(model / "vae" / "v.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns))
        found.append(model_fingerprint([str(model)]))
    assert len(set(found)) == 4
    (model / ".davae.json").write_text("{}")
    (model / "README.md").write_text("card")
    assert model_fingerprint([str(model)]) == found[-1]
    assert model_fingerprint([str(model)] * 2) != found[-1]

    large = model / "large.safetensors"
    monkeypatch.setattr(hashing, "LARGE", 0)
    large.write_bytes(b"x" * 1000)
    first = hashing.file_hash(large)
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "atomic_text", lambda *args: pytest.fail("hashed again"))
        assert hashing.file_hash(large) == first
    about = large.stat()
    large.write_bytes(b"y" * 1000)
    os.utime(large, ns=(about.st_atime_ns, about.st_mtime_ns))  # the same size and time: the change time differs
    assert hashing.file_hash(large) != first


def test_a_file_of_the_hub_s_cache_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its blob is named by the SHA-256 of the content, that of a small text file by git's hash."""
    monkeypatch.setattr(hashing, "LARGE", 10)
    (tmp_path / "blobs").mkdir()
    for content, name, known in ((b"w" * 1000, "0" * 64, True), (b"t" * 1000, "1" * 40, False)):
        (tmp_path / "blobs" / name).write_bytes(content)
        file = tmp_path / f"{name[0]}.safetensors"
        file.symlink_to(tmp_path / "blobs" / name)
        assert hashing.file_hash(file) == (name if known else hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ({"_class_name": "DDIMScheduler"}, False),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}, False),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": False}, False),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, False),
        ({"_class_name": "DDPMScheduler"}, True),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, True),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, True),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, True),
    ],
)
def test_the_rule_of_the_steps_noise_is_in_the_fingerprints_of_schedulers_that_add_it(
    config: dict[str, Any], counts: bool, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Images of a former rule are drawn again, and those of other schedulers stay."""
    plain = hashing.hash_values([hashing._place(str(model))])
    assert model_fingerprint([str(model)]) == plain, "without a scheduler"
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    plain = hashing.hash_values([hashing._place(str(model))])  # as before there was a rule
    found = model_fingerprint([str(model)])
    assert (found != plain) is counts
    monkeypatch.setattr(hashing, "STEP_NOISE", hashing.STEP_NOISE + 1)
    assert (model_fingerprint([str(model)]) != found) is counts


def test_a_sample_file_of_other_weights_is_refused_and_its_parts_are_not_needed(tmp_path: Path):
    target, drawn = tmp_path / "s.npz", []

    def draw(classes: list[int], first: int) -> torch.Tensor:
        drawn.append(first)
        return torch.zeros(len(classes), 3, 2, 2)

    labels = np.zeros(3, int)
    assert write_samples(target, labels, draw, settings={"seed": 0, "weights": "a"}, about={"pipeline": "x"})
    with pytest.raises(ModelError, match=r"images of other settings \(the weights changed\)"):
        write_samples(target, labels, draw, settings={"seed": 0, "weights": "b"}, about={"pipeline": "x"})
    shutil.rmtree(tmp_path / "s.npz.parts")
    assert write_samples(target, labels, draw, settings={"seed": 0, "weights": "a"}, about={"pipeline": "y"})
    assert drawn == [0]
    np.savez(target, arr_0=np.zeros(2))
    with pytest.raises(RunError, match="not a sample file that davae wrote"):
        write_samples(target, labels, draw, settings={"seed": 0, "weights": "a"})


# -- images that are not finite --------------------------------------------------------------------------------------


class Decoder:
    """An autoencoder whose images are its latents."""

    dtype = torch.float16

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        images = latents * 2
        return SimpleNamespace(sample=images) if return_dict else (images,)


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_images_that_are_not_finite_are_named_with_their_prompt(return_dict: bool, one_by_one: bool):
    pipeline = SimpleNamespace(vae=Decoder())
    latents = torch.zeros(3, 4, 2, 2)
    latents[1, 0, 0, 0] = torch.nan

    def decode(prompts: list[str], parts: list[torch.Tensor]) -> None:
        with checked_decoding(pipeline, prompts):
            for part in parts:
                pipeline.vae.decode(part, return_dict=return_dict)

    with pytest.raises(ModelError) as raised:
        decode(["a rose", "a red\ncat", "a dog"], list(latents.split(1 if one_by_one else 3)))
    assert "image of 'a red\\ncat': NaN or infinite values in the latents" in str(raised.value)
    assert "use --dtype bfloat16 or float32" in str(raised.value)
    assert "decode" not in vars(pipeline.vae)
    with pytest.raises(ModelError, match="and 1 more: NaN or infinite values in the autoencoder's output"):
        decode(["a", "b"], [torch.full((2, 4, 2, 2), 4e4, dtype=torch.float16)])  # overflows
    decode(["a"], [latents[:1]])


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_broken_model_writes_no_black_image(part: str, tiny_base: Path, tmp_path: Path):
    pipeline = load_pipeline(str(tiny_base))
    good = generate(pipeline, ["a red square"], SamplingOptions(resolution=16, steps=1))
    assert np.asarray(good[0]).any()
    layer = pipeline.vae.decoder.conv_out if part == "vae" else pipeline.transformer.proj_out
    torch.nn.init.constant_(layer.bias, torch.nan)
    how = SamplingOptions(steps=1, guidance=1.0, seed=0, resolution=16, batch_size=1)
    with pytest.raises(
        ModelError, match=r"image of 'a red square': NaN or infinite values in .*; the weights are damaged"
    ):
        sample_to_folder(pipeline, ["a red square"], tmp_path, how, num=1, on_batch=lambda done, total: None)
    assert not list(tmp_path.rglob("*.png"))


def test_a_reconstruction_that_is_not_finite_is_no_score():
    images = torch.rand(3, 3, 16, 16) * 2 - 1

    def broken(batch: torch.Tensor) -> torch.Tensor:
        return batch / torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)[: len(batch)]

    with pytest.raises(ModelError, match="reconstruction of image 1: NaN or infinite values"):
        score_reconstructions([images], broken, {})


def test_half_a_character_in_a_prompt_is_one_line(tmp_path: Path):
    (tmp_path / "p.json").write_text('["a cat", "a \\udcff dog"]')
    with pytest.raises(DataError, match="half a character"):
        read_prompts(tmp_path / "p.json")


def test_parts_and_prompts_of_a_davae_without_fingerprints_resume(model: Path, tmp_path: Path, drawn: list[str]):
    target, calls = tmp_path / "s.npz", []

    def draw(classes: list[int], first: int) -> torch.Tensor:
        calls.append(first)
        return torch.zeros(len(classes), 3, 2, 2)

    former = {"seed": 0, "pipeline": "x"}
    options: dict[str, Any] = {"settings": {"seed": 0, "weights": "a"}, "about": {"pipeline": "x"}, "former": former}
    assert write_samples(target, np.zeros(3, int), draw, **options)
    target.unlink()
    (tmp_path / "s.npz.parts" / "settings.json").write_text(json.dumps({**former, "num": 3}, sort_keys=True))
    assert write_samples(target, np.zeros(3, int), draw, **options)
    assert calls == [0]
    target.unlink()
    (tmp_path / "s.npz.parts" / "settings.json").write_text(json.dumps({**former, "num": 3, "seed": 1}))
    with pytest.raises(ModelError, match="other settings"):
        write_samples(target, np.zeros(3, int), draw, **options)

    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("one\n")
    evaluate(model, prompts, out)
    values = json.loads((out / "settings.json").read_text())
    for name in ("weights", "prompt_file"):
        del values[name]
    (out / "settings.json").write_text(json.dumps(values))
    evaluate(model, prompts, out)
    assert drawn == ["one"]
    assert "weights" in json.loads((out / "settings.json").read_text())
