"""The embedded model and its shipped upgrade: sizes, figures of their card, and what they are for."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from davae.analyze.sensitivity import reconstructions
from davae.cost.flops import count
from davae.data.images import ImageDataset, split
from davae.data.openmoji import OpenMoji, emoji_names
from davae.evaluate.reconstruction import score_reconstructions
from davae.publish.assemble import read_details
from davae.publish.upgrade_file import find_upgrade
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, open_autoencoder, open_model
from davae.zoo import FOLDER, UPGRADES, resolve


@pytest.fixture(scope="module")
def held_out() -> list[torch.Tensor]:
    """The held-out emoji at 128 px, white background."""
    source = OpenMoji(128)
    pictures = ImageDataset(source, split(source, 0.1).held_out, 128)
    return list(torch.stack([pictures[(i, -1)]["image"] for i in range(len(pictures))]).split(16))


@pytest.fixture(scope="module")
def upgraded():
    return open_model("micro-upgraded")[0]


def test_all_shipped_weights_stay_under_60_mb_in_a_wheel(tmp_path: Path):
    """A wheel is a zip; its code takes 1 MB more."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    with ZipFile(tmp_path / "zoo.zip", "w", ZIP_DEFLATED, compresslevel=1) as wheel:
        for path in files:
            wheel.write(path)
    assert (tmp_path / "zoo.zip").stat().st_size < 59e6
    assert not list(FOLDER.rglob("*.bin")) + list(FOLDER.rglob("*.pt"))


def test_micro_is_a_plain_stable_diffusion_3():
    pipeline = StableDiffusion3Pipeline.from_pretrained(resolve("micro"))
    pipeline.set_progress_bar_config(disable=True)
    assert count(pipeline.transformer.parameters()) < 10e6
    image = pipeline("a red rose", num_inference_steps=2, max_sequence_length=1).images[0]
    assert image.size == (64, 64)


def test_base_autoencoder_reaches_26_db_on_held_out_emoji(held_out: list[torch.Tensor]):
    vae = open_autoencoder("micro")
    small = [
        torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(-1, 1) for x in held_out
    ]
    with torch.no_grad():
        scores = score_reconstructions(small, lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample)
    assert scores.psnr > 26


def test_shipped_detail_vae_on_held_out_emoji(held_out: list[torch.Tensor], upgraded):
    """At least 4 dB above base + bicubic; zero or random detail at least 2.5 dB below the full latent (Fig. S2a)."""
    psnr = {
        name: score_reconstructions(held_out, reconstruct).psnr
        for name, reconstruct in reconstructions(upgraded.vae, open_autoencoder("micro")).items()
    }
    assert psnr["full"] > psnr["base + bicubic"] + 4
    assert psnr["full"] > psnr["zero detail"] + 2.5
    assert psnr["zero detail"] > psnr["random detail"]


def test_shipped_upgrade_draws_at_128_with_the_tokens_of_64(upgraded):
    options = SamplingOptions(steps=8, guidance=4.0, seed=0)
    base = generate(open_model("micro")[0], ["a red rose"], options)[0]
    picture = generate(upgraded, ["a red rose"], options)[0]
    assert (base.size, picture.size) == ((64, 64), (128, 128))
    small = np.asarray(picture.resize((64, 64)), dtype=float)
    similarity = np.corrcoef(small.ravel(), np.asarray(base, dtype=float).ravel())[0, 1]
    assert similarity > 0.5  # same base noise, same prompt: the same composition


def test_openmoji_sets():
    chosen, everything = emoji_names(), emoji_names(everything=True)
    assert chosen.items() <= everything.items()
    assert (len(chosen), len(everything)) == (314, 1918)
    assert everything["1F1EF-1F1F5"] == "flag of japan"
    assert {"rose", "pizza", "cat face"} <= set(chosen.values())
    assert Path(FOLDER).is_dir()


def test_clothing_draws_clothes_by_name_at_64_px():
    """The same class by name and by number, another one for another name."""
    pipeline, _ = open_model("clothing")
    options = SamplingOptions(steps=2, guidance=2.5, seed=0)
    by_name, by_number, other = (generate(pipeline, [label], options)[0] for label in ("dress", "3", "hat"))
    assert np.asarray(by_name).shape == (64, 64, 3)
    assert np.array_equal(np.asarray(by_name), np.asarray(by_number))
    assert not np.array_equal(np.asarray(by_name), np.asarray(other))


def test_clothing_upgraded_draws_the_same_classes_at_128_px():
    """Its changes are stored in 8 bits, and the base is ahead; the class and the noise decide what it draws."""
    details = read_details(UPGRADES["clothing"], find_upgrade("clothing-upgraded").metadata)
    assert details.changes is not None
    assert details.changes.rank is None
    assert details.changes.kept > 0.9999
    assert details.detail_offset == 0.6
    pipeline, _ = open_model("clothing-upgraded")
    assert pipeline.class_names == open_model("clothing")[0].class_names
    options = SamplingOptions(steps=2, guidance=4.0, seed=0)
    dress, again, hat = (np.asarray(generate(pipeline, [name], options)[0]) for name in ("dress", "dress", "hat"))
    assert dress.shape == (128, 128, 3)
    assert np.array_equal(dress, again)
    assert not np.array_equal(dress, hat)


def test_folders_of_embedded_models_name_no_path_of_a_machine():
    for path in FOLDER.rglob("config.json"):
        assert not json.loads(path.read_text()).get("_name_or_path"), path
