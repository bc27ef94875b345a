"""`davae make-data` and `davae bench`: shards that hold what was asked, resumed, shared, trainable."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_training import fails, run_cli

from davae.data.sources import open_source
from davae.pretrained.open import load_pipeline
from davae.sample import make_data as synthesis
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions

PROMPTS = ["a red square", "a blue disc", "a square"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def arguments(base: Path, prompts: Path, out: Path, *more: str) -> tuple[str, ...]:
    common = (
        "--num",
        "5",
        "--steps",
        "2",
        "--guidance",
        "2",
        "--seed",
        "7",
        "--shard-size",
        "2",
        "--batch-size",
        "2",
    )
    return "make-data", "--model", str(base), "--prompts", str(prompts), "--out", str(out), *common, *more


def test_shards_hold_pictures_prompts_and_settings(
    tiny_base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "own"
    run_cli(*arguments(tiny_base, prompts, out))
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "settings.json"]
    source = open_source(str(out), 16)
    assert [source.load(i)[1] for i in range(5)] == [PROMPTS[i % 3] for i in range(5)]
    wanted = generate(
        load_pipeline(str(tiny_base)),
        [PROMPTS[0]],
        SamplingOptions(resolution=16, steps=2, guidance=2.0, seed=7),
        first=3,
    )[0]
    assert np.abs(np.asarray(source.load(3)[0], int) - np.asarray(wanted, int)).max() <= 1
    record = json.loads(members(out / "00001.tar")["00000003.json"])
    assert {**record, "model": None} == {
        "prompt": "a red square", "number": 3, "model": None, "prompts": "p.txt", "num": 5, "resolution": 16, "steps": 2,
        "guidance": 2.0, "seed": 7, "shard_size": 2, "format": "png", "dtype": "float32",
    }  # fmt: skip
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    run_cli(*arguments(tiny_base, prompts, out))
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert "images of other settings" in fails(capsys, *arguments(tiny_base, prompts, out, "--seed", "8"))


def test_interrupted_it_draws_only_what_is_missing(
    tiny_base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "options": SamplingOptions(steps=2, guidance=2.0, seed=7, batch_size=1),
        "num": 5, "shard_size": 4, "image_format": "jpg", "on_image": lambda done, total: None,
    }  # fmt: skip
    synthesis.draw_training_set(str(tiny_base), prompts, tmp_path / "whole", **options)
    drawn: list[int] = []

    def counting(*args: Any, first: int, **kwargs: Any) -> list[Image.Image]:
        if len(drawn) == 2:
            drawn.append(-1)
            raise KeyboardInterrupt
        drawn.append(first)
        return generate(*args, first=first, **kwargs)

    monkeypatch.setattr(synthesis, "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        synthesis.draw_training_set(str(tiny_base), prompts, tmp_path / "cut", **options)
    assert not list((tmp_path / "cut").glob("*.tar"))
    (tmp_path / "cut" / ".00000" / "00000002.partial").write_bytes(b"half")
    assert synthesis.draw_training_set(str(tiny_base), prompts, tmp_path / "cut", **options) == 0
    assert drawn == [0, 1, -1, 2, 3, 4]
    for name in ("00000.tar", "00001.tar"):
        assert members(tmp_path / "cut" / name) == members(tmp_path / "whole" / name)

    class Second:
        is_main_process, process_index, num_processes, device = False, 1, 2, "cpu"

        def wait_for_everyone(self) -> None: ...

    monkeypatch.setattr(synthesis, "PartialState", Second)
    monkeypatch.setattr(synthesis, "generate", generate)
    assert synthesis.draw_training_set(str(tiny_base), prompts, tmp_path / "second", **options) == 1, (
        "the first makes shard 0"
    )
    assert [path.name for path in (tmp_path / "second").glob("*.tar")] == ["00001.tar"]


def test_bench_of_cache_and_data(tiny_base: Path, picture_folder: Path, tmp_path: Path) -> None:
    import yaml
    from conftest import tiny_upgrade_recipe

    values = tiny_upgrade_recipe(tiny_base, picture_folder, stage1__max_steps=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    common = (str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--json", str(tmp_path / "f.json"))
    run_cli("bench", "cache", *common)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["items"] in range(16, 25)
    latent = 12 * 8 * 8 * 2 / 1e6 * 1000
    assert latent < figures["latents_mb_per_1000"] < latent * 1.2
    run_cli("bench", "data", *common, "--steps", "3")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert 0 < figures["data_share"] < 1
    assert figures["steps"] == 3
