"""`SamplingOptions`: what folders of images and figures record, and what verbs make of typed options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from davae.commands.options import sampling_options
from davae.errors import ModelError
from davae.pretrained.placement import Placement
from davae.sample.open import SamplingOptions, samples_folder


def test_settings_are_those_that_folders_of_earlier_versions_hold():
    options = SamplingOptions(steps=7, guidance=1.5, seed=3, batch_size=2)
    assert options.settings == {"steps": 7, "guidance": 1.5, "seed": 3}, "not the batch size, which changes no image"
    assert list(SamplingOptions(resolution=32).settings) == ["steps", "guidance", "seed", "resolution"]
    half = SamplingOptions(placement=Placement("float16", "model", "blocks"), resolution=32).settings
    assert list(half.items())[3:] == [("dtype", "float16"), ("resolution", 32)]
    assert options.figures == {"steps": 7, "guidance_scale": 1.5, "seed": 3}


def test_a_precision_is_a_name_or_a_dtype_of_torch():
    assert Placement(torch.bfloat16) == Placement("bfloat16")
    assert Placement(torch.float32).changes == {}
    assert (Placement(torch.half).changes, Placement("float16").dtype) == ({"dtype": "float16"}, torch.float16)
    for wrong in ("bf16", torch.float64, None):
        with pytest.raises(ModelError, match=r"^dtype: found \S+; use float32, bfloat16, float16$"):
            Placement(wrong)


def test_a_side_is_one_number():
    assert (SamplingOptions().side, SamplingOptions(resolution=64).side) == (None, 64)
    with pytest.raises(AssertionError):
        _ = SamplingOptions(resolution=(32, 64)).side


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("org/name", "samples/name"),
        ("org/name@refs/pr/5", "samples/name@refs-pr-5"),
        ("org/name@v1", "samples/name@v1"),
        ("micro-upgraded", "samples/micro-upgraded"),
        ("models/sd35@v1/", "samples/sd35@v1"),
        ("models/../sd35", "samples/sd35"),
        (".", "samples/inside"),
        ("..", "samples/outside"),
        ("run/", "run/samples"),
    ],
)
def test_the_folder_of_samples_has_the_model_s_name(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for place in ("outside/inside/models/sd35@v1", "outside/inside/run/pipeline"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outside" / "inside")
    assert samples_folder(name, "run/pipeline" if name == "run/" else name) == Path(folder)


def test_a_verb_gives_the_options_that_it_has():
    typed = {
        "steps": 4,
        "guidance": 3.0,
        "seed": 1,
        "batch_size": 2,
        "num": 5,
        "dtype": "bfloat16",
        "offload": "model",
    }
    expected = SamplingOptions(4, 3.0, 1, None, 2, Placement("bfloat16", "model", "off"))
    assert sampling_options(typed) == expected
    assert sampling_options({"seed": 9}) == SamplingOptions(seed=9)
