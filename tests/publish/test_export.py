"""Three ways out of a finished run, all the same model; folders that need no davae; model cards and the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cases import BUILDERS
from conftest import tiny_upgrade_recipe
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_class_conditional import finished as class_run
from test_lora import base_lora
from test_training import fails, run_cli

from davae import DetailVAE
from davae.errors import ModelError
from davae.files.ownership import MARK
from davae.pretrained.open import load_pipeline
from davae.publish import assemble
from davae.publish.hub import push
from davae.publish.upgrade_file import vae_id
from davae.recipes import validate
from davae.runs.upgrade import Upgrade

__all__ = ["class_run"]  # a fixture

# a learning rate at which four steps leave a LoRA that matters
CHANGES = {"stage2__lr": 0.05, "stage2__ema_decay": 0.0, "stage2__warmup_steps": 0}
PREFIX = {"sd3": "transformer.transformer_blocks.0.attn", "flux": "transformer.transformer_blocks.0.attn"}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    flux = tmp_path_factory.mktemp("flux") / "base"
    BUILDERS["FluxTransformer2DModel"](flux)
    (flux / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\n---\n\nA tiny model.\n")
    return {"sd3": tiny_base, "flux": flux}


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA run of each; SD3's with its report."""
    folder = tmp_path_factory.mktemp("runs")
    values = {name: tiny_upgrade_recipe(base, picture_folder, **CHANGES) for name, base in bases.items()}
    (folder / "sd3.yaml").write_text(yaml.safe_dump(values["sd3"]))
    run_cli("upgrade", str(folder / "sd3.yaml"), "--out", str(folder / "sd3"))
    Upgrade(validate(values["flux"], "flux"), folder / "flux", lambda progress: None).run()  # type: ignore[arg-type]
    return {name: folder / name for name in bases}


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Run -> way -> exported folder, float32."""
    out = tmp_path_factory.mktemp("out")
    for name, run in runs.items():
        for way in ("fused", "lora", "upgrade"):
            run_cli("export", str(run), "--as", way, "--out", str(out / name / way), "--dtype", "float32")
    return {name: {path.name: path for path in (out / name).iterdir()} for name in runs}


def draw(pipeline: Any) -> torch.Tensor:
    """Latents of two steps, (1,C+D,h,w) or packed."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red square", num_inference_steps=2, max_sequence_length=8, generator=generator, output_type="latent"
    ).images


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_three_ways_out_are_one_model(name: str, exports: dict, bases: dict[str, Path], tmp_path: Path):
    ways = exports[name]
    run_cli(
        "apply", str(ways["upgrade"]), "--base", str(bases[name]), "--out", str(tmp_path / "on"), "--dtype", "float32"
    )
    fused, applied, lora = (load_pipeline(str(folder)) for folder in (ways["fused"], tmp_path / "on", ways["lora"]))
    for part in ("transformer", "vae"):
        mine, theirs = (getattr(p, part).state_dict() for p in (fused, applied))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), part
    assert type(fused) is type(applied) is type(lora)
    assert torch.equal(fused.vae.std, applied.vae.std)

    expected = draw(fused)
    assert torch.equal(draw(applied), expected)
    bare = draw(lora)
    lora.load_lora_weights(ways["lora"])
    scale = float(expected.abs().max())
    assert float((draw(lora) - expected).abs().max()) < 1e-4 * scale
    assert float((bare - expected).abs().max()) > 1e-2 * scale  # the file carries something
    with safe_open(ways["lora"] / "pytorch_lora_weights.safetensors", framework="pt") as stream:
        settings = json.loads(stream.metadata()["lora_adapter_metadata"])
        assert f"{PREFIX[name]}.to_q.lora_A.weight" in stream.keys()  # noqa: SIM118  # no mapping
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (2, 2)
    # no path of this machine leaves it
    for file in [*ways["fused"].rglob("*.json"), *ways["lora"].rglob("*.json"), *ways["upgrade"].rglob("*.json")]:
        assert str(Path(exports[name]["fused"]).parents[2]) not in file.read_text(), file


def test_half_precision_is_the_default_and_near(runs: dict[str, Path], exports: dict, tmp_path: Path):
    run_cli("export", str(runs["sd3"]), "--out", str(tmp_path / "up"))
    run_cli("apply", str(tmp_path / "up"), "--base", str(base_of(runs["sd3"])), "--out", str(tmp_path / "on"))
    weights = load_file(tmp_path / "on/transformer/diffusion_pytorch_model.safetensors")
    exact = load_file(exports["sd3"]["fused"] / "transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(float((weights[n].float() - exact[n]).norm()) <= 2e-3 * float(exact[n].norm()) for n in exact)


def base_of(run: Path) -> str:
    return yaml.safe_load((run / "recipe.yaml").read_text())["base"]["model"]


def test_full_fine_tuning_leaves_fused_and_as_an_upgrade(
    class_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Of a model of davae's own class, whose base the run trained."""
    for way in ("fused", "upgrade"):
        run_cli("export", str(class_run), "--as", way, "--out", str(tmp_path / way), "--dtype", "float32")
    base = class_run / "base" / "pipeline"
    run_cli(
        "apply", str(tmp_path / "upgrade"), "--base", str(base), "--out", str(tmp_path / "on"), "--dtype", "float32"
    )
    fused, applied = (load_pipeline(str(tmp_path / name)) for name in ("fused", "on"))
    mine, theirs = (p.transformer.state_dict() for p in (fused, applied))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert applied.class_names == fused.class_names == ["golf ball", "tench"]
    line = fails(capsys, "export", str(class_run), "--as", "lora", "--out", str(tmp_path / "no"))
    assert "it has no LoRA; use --as fused or --as upgrade" in line


def test_a_pipeline_without_lora_loader_says_what_to_use(runs: dict[str, Path], tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["sd3"], run, ignore=shutil.ignore_patterns("checkpoints", "cache", ".lock"))
    index = json.loads((run / "pipeline/model_index.json").read_text())
    (run / "pipeline/model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtSigmaPipeline"}))
    line = fails(capsys, "export", str(run), "--as", "lora", "--out", str(tmp_path / "x"))
    assert (
        line == "davae: PixArtSigmaPipeline cannot load LoRA files; use --as fused (LoRA folded in) or --as upgrade"
    )
    assert not (tmp_path / "x").exists()


# -- apply on the wrong base -----------------------------------------------------------------------------------------


def changed(base: Path, target: Path, **configs: dict) -> Path:
    """A copy of a pipeline folder whose configs say something else; its weights stay."""
    shutil.copytree(base, target)
    for part, values in configs.items():
        file = target / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return target


def test_apply_refuses_another_base_in_one_line(
    exports: dict, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    upgrade, base = exports["sd3"]["upgrade"], bases["sd3"]

    def refused(on: Path, *more: str, of: Path = upgrade) -> str:
        line = fails(capsys, "apply", str(of), "--base", str(on), "--out", str(tmp_path / "no"), *more)
        assert not (tmp_path / "no").exists()
        return line

    assert "upgrades a SD3Transformer2DModel of 4 channels" in refused(bases["flux"])
    assert "has a FluxTransformer2DModel of 4" in refused(bases["flux"])
    assert "upgraded already" in refused(exports["sd3"]["fused"])
    eight = changed(base, tmp_path / "8", transformer={"in_channels": 8}, vae={"latent_channels": 8})
    assert "has a SD3Transformer2DModel of 8" in refused(eight)
    deeper = changed(base, tmp_path / "deeper", transformer={"num_layers": 9})
    for weights in deeper.rglob("*.safetensors"):
        weights.unlink()  # refused by its configs alone
    assert "does not fit this transformer: 'transformer_blocks." in refused(deeper)

    deep = tmp_path / "deep"
    shutil.copytree(base, deep)
    model = SD3Transformer2DModel.from_pretrained(base / "transformer")
    SD3Transformer2DModel.from_config({**model.config, "num_layers": 3}).save_pretrained(deep / "transformer")
    assert "is in only one of them" in refused(deep)

    other = tmp_path / "other-vae"
    shutil.copytree(base, other)
    vae: Any = AutoencoderKL.from_pretrained(base / "vae")
    torch.nn.init.normal_(vae.encoder.conv_out.weight)
    vae.save_pretrained(other / "vae")
    assert "has another autoencoder than the upgrade's DetailVAE was made from" in refused(other)


def test_apply_compares_upgrade_and_base_once(
    exports: dict, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[Path] = []
    monkeypatch.setattr(assemble, "file_shapes", lambda path, of=assemble.file_shapes: read.append(path) or of(path))
    run_cli("apply", str(exports["sd3"]["upgrade"]), "--base", str(bases["sd3"]), "--out", str(tmp_path / "out"))
    assert len(read) == 1


def test_an_upgrade_knows_its_detail_vae(
    exports: dict, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    upgrade, base = exports["sd3"]["upgrade"], str(bases["sd3"])
    alone = tmp_path / "alone" / "upgrade.safetensors"
    alone.parent.mkdir()
    shutil.copy(upgrade / "upgrade.safetensors", alone)
    out = ("--base", base, "--out", str(tmp_path / "out"), "--dtype", "float32")
    assert "needs its DetailVAE" in fails(capsys, "apply", str(alone), *out)
    shutil.copytree(upgrade / "vae", tmp_path / "vae")
    vae: Any = DetailVAE.from_pretrained(tmp_path / "vae")
    assert vae_id(tmp_path / "vae") == vae_id(upgrade / "vae")
    with torch.no_grad():
        next(vae.decoder.parameters()).view(-1)[0] += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    line = fails(capsys, "apply", str(alone), *out, "--vae", str(tmp_path / "vae"))
    assert f"was trained with DetailVAE {vae_id(upgrade / 'vae')[:12]}" in line
    assert vae_id(tmp_path / "vae")[:12] in line
    run_cli("apply", str(alone), *out, "--vae", str(upgrade / "vae"))
    assert (tmp_path / "out/model_index.json").is_file()
    line = fails(capsys, "apply", str(upgrade), "--base", "x/y/z", "--out", str(tmp_path / "o"))
    assert "model 'x/y/z': there is no such folder here" in line
    assert "upgrade.safetensors does not exist" in fails(capsys, "apply", str(tmp_path), *out)


# -- folders without davae -------------------------------------------------------------------------------------------

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "davae":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
"""


def code_of(card: str, language: str = "python") -> str:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)[0]


def picture_of(pipeline: Any, prompt: str, **more: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline(prompt, num_inference_steps=2, generator=generator, **more).images[0], dtype=int)


def test_a_self_contained_folder_needs_no_davae(
    runs: dict[str, Path], class_run: Path, exports: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A text model with its LoRA file, and a model and pipeline of davae's own classes; the cards' code among it."""
    run_cli(
        *("export", str(runs["sd3"]), "--as", "lora", "--self-contained", "--dtype", "float32"),
        *("--out", str(tmp_path / "text")),
    )
    run_cli("export", str(class_run), "--self-contained", "--out", str(tmp_path / "class"), "--dtype", "float32")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("text", "class")}
    code = BLOCKED + "import os\nimport torch\n"
    for name, prompt in (("text", "a red square"), ("class", "tench")):
        code += f"os.chdir({str(tmp_path / name)!r})\n{code_of(cards[name])}\n"
        code += f"picture = pipe({prompt!r}, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]\n"
        code += f"picture.save({str(tmp_path / f'{name}.png')!r})\n"
        code += "assert 'davae' not in sys.modules\n"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    )
    expected = {
        "text": picture_of(load_pipeline(str(exports["sd3"]["fused"])), "a red square"),
        "class": picture_of(load_pipeline(str(class_run / "pipeline")), "tench"),
    }
    for name, picture in expected.items():
        assert np.abs(np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int) - picture).max() <= 1
    here = load_pipeline(str(tmp_path / "class"))  # with the davae that is here, not with the folder's code
    assert type(here).__module__.startswith("davae.")
    assert (picture_of(here, "tench") == expected["class"]).all()
    assert type(load_pipeline(str(tmp_path / "text")).vae) is DetailVAE
    line = fails(
        capsys, "export", str(runs["sd3"]), "--as", "upgrade", "--self-contained", "--out", str(tmp_path / "x")
    )
    assert "--self-contained is for whole pipelines" in line


# -- cards and hub ---------------------------------------------------------------------------------------------------


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_it_is_and_its_code_runs(
    exports: dict, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    card = (exports["sd3"]["fused"] / "README.md").read_text()
    assert header(card) == {
        "library_name": "diffusers",
        "license": "unknown",
        "pipeline_tag": "text-to-image",
        "tags": ["davae", "diffusers", "StableDiffusion3Pipeline"],
    }
    assert "Unknown: the base comes without a model card" in card
    figures = json.loads((runs["sd3"] / "report.json").read_text())
    assert f"{figures['reconstruction'][-1]['psnr']:.2f}" in card
    recipe = yaml.safe_load(code_of(card, "yaml"))
    assert recipe["stage2"]["lora"] == {"rank": 2}
    assert "/" not in recipe["data"]["source"]
    flux = (exports["flux"]["fused"] / "README.md").read_text()
    assert {key: header(flux)[key] for key in ("license", "license_name")} == {
        "license": "other",
        "license_name": "tiny-licence",
    }
    assert "As the base: tiny-licence" in flux
    assert "its report was written" in flux  # this run has none

    for way in ("fused", "lora"):
        monkeypatch.chdir(exports["sd3"][way])
        exec(code_of(Path("README.md").read_text()).replace("image.png", str(tmp_path / f"{way}.png")), {})
    assert Image.open(tmp_path / "fused.png").size == Image.open(tmp_path / "lora.png").size == (32, 32)


def test_the_card_of_an_upgrade_says_how_to_apply_it(
    exports: dict, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = exports["sd3"]["upgrade"]
    words = code_of((folder / "README.md").read_text(), "sh").split("#")[0].split()
    swaps = {"path/to/base": str(bases["sd3"]), "upgraded": str(tmp_path / "upgraded")}
    monkeypatch.chdir(folder)
    run_cli(*[swaps.get(word, word) for word in words[1:]])
    card = (tmp_path / "upgraded/README.md").read_text()
    assert "See the card of the upgrade" in card
    assert "StableDiffusion3Pipeline.from_pretrained" in code_of(card)


def test_the_shipped_upgrade_s_card_gives_openmoji_its_due(tmp_path: Path):
    run_cli("apply", "micro-upgraded", "--base", "micro", "--out", str(tmp_path / "micro"))
    card = (tmp_path / "micro/README.md").read_text()
    assert header(card)["license"] == "cc-by-sa-4.0"
    assert "OpenMoji (openmoji.org), CC BY-SA 4.0" in card


class Api:
    """Stands in for huggingface_hub.HfApi and notes what it is asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_push_uploads_nothing_that_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("davae.publish.hub.HfApi", Api)
    monkeypatch.setattr(Api, "calls", [], raising=False)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "inner").symlink_to("model_index.json")
    push(folder, "me/tiny")
    assert len(Api.calls) == 2
    for name, target in (
        ("key", "../secrets/key"),
        ("vae/all", tmp_path / "secrets"),
        ("b", "gone/../.."),
        ("c", "."),
    ):
        (folder / name).symlink_to(target)
        with pytest.raises(ModelError, match=f"{name}: it is a link to"):
            push(folder, "me/tiny")
        (folder / name).unlink()
    assert len(Api.calls) == 2


def test_push(exports: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("davae.publish.hub.HfApi", Api)
    monkeypatch.setattr(Api, "calls", [], raising=False)
    folder = exports["sd3"]["fused"]
    run_cli("push", str(folder), "me/tiny")
    run_cli("push", str(folder), "me/tiny", "--public", "--message", "First")
    assert "https://huggingface.co/me/tiny" in capsys.readouterr().out
    upload = {"repo_id": "me/tiny", "folder_path": folder}
    assert Api.calls == [
        ("me/tiny", {"private": True, "exist_ok": True}),
        ("upload", {**upload, "commit_message": "Upload fused with davae"}),
        ("me/tiny", {"private": False, "exist_ok": True}),
        ("upload", {**upload, "commit_message": "First"}),
    ]
    assert "give a folder that `davae export` wrote" in fails(capsys, "push", str(tmp_path), "me/tiny")
    (tmp_path / "upgrade.safetensors").touch()
    (tmp_path / "recipe.yaml").touch()
    assert "is a run, with its data" in fails(capsys, "push", str(tmp_path), "me/tiny")
    for name in ("a/b/c", "a/b@main"):
        assert "is not a hub id" in fails(capsys, "push", str(folder), name)
    # the real one, where nothing listens
    monkeypatch.setattr("davae.publish.hub.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="none"))
    line = fails(capsys, "push", str(folder), "me/tiny")
    assert "the hub did not take" in line
    assert "check the network and `hf auth login`" in line


def test_the_page_s_commands_and_code_run_in_order(
    runs: dict[str, Path], bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """docs/export.md as written, on the tiny model.

    The block that runs a folder's own code is tested above, that of a full fine-tuning in test_changes.py.
    """
    page = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text()
    monkeypatch.setattr("davae.publish.hub.HfApi", Api)
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.chdir(tmp_path)
    model: Any = SD3Transformer2DModel.from_pretrained(bases["sd3"] / "transformer")
    config, state = base_lora(model)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=config.to_dict(),
        weight_name="style.safetensors",
    )
    swaps = {"runs/micro": str(runs["sd3"]), "micro": str(bases["sd3"])}
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 10
    for language, block in blocks:
        if "runs/full" in block:
            continue
        if language == "sh":
            for line in block.splitlines():
                run_cli(*[swaps.get(word, word) for word in line.split()[1:]])
        elif "trust_remote_code" not in block:
            exec(block.replace("num_inference_steps=30", "num_inference_steps=1"), {})
    assert Path("rose.png").is_file()
    upgraded = StableDiffusion3Pipeline.from_pretrained("micro-128")
    upgraded.load_lora_weights("style-128.safetensors")
    assert Api.calls[0][0] == "me/micro-128"


def test_a_truncated_upgrade_file_is_one_line(
    bases: dict[str, Path], exports: dict[str, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exports["sd3"]["upgrade"], broken)
    file = broken / "upgrade.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    message = fails(capsys, "apply", str(broken), "--base", str(bases["sd3"]), "--out", str(tmp_path / "out"))
    assert str(file) in message
    assert "damaged" in message


def test_an_autoencoder_without_weights_is_one_line(
    exports: dict[str, dict[str, Path]], picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    shutil.copy(exports["sd3"]["upgrade"] / "vae" / "config.json", folder)
    message = fails(
        capsys, "evaluate", "reconstruction", "--vae", str(folder), "--data", str(picture_folder), "--num", "4"
    )
    assert f"autoencoder {folder} cannot be loaded" in message


def test_an_export_replaces_exports_alone(
    runs: dict[str, Path], exports: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The folder of somebody else, the run itself, its parts, what holds it, a file, a link to either; all stay."""
    run = runs["sd3"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "thesis.txt").write_text("put away")
    places = [mine, mine / "thesis.txt", mine / "thesis.txt" / "x", tmp_path / "link", tmp_path]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in [*places, run, run / "pipeline", run / "vae", run.parent]:
        line = fails(capsys, "export", str(run), "--out", str(out))
        assert "use another --out" in line, out
    upgrade = exports["sd3"]["upgrade"]
    for out in (mine, upgrade, Path(base_of(run))):
        fails(capsys, "apply", str(upgrade), "--base", base_of(run), "--out", str(out))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (run / "pipeline" / "model_index.json").is_file()

    for _ in range(2):  # over an export of this davae, then over one of a davae without marks
        run_cli("export", str(run), "--out", str(tmp_path / "out"))
        (tmp_path / "out" / MARK).unlink()
    assert (tmp_path / ".out.old" / "thesis.txt").read_text() == "put away"
    (tmp_path / "to").symlink_to(tmp_path / "out")
    run_cli("export", str(run), "--out", str(tmp_path / "to"))
    assert (tmp_path / "to").is_symlink()
    (tmp_path / "out" / "README.md").write_text("my own words")
    assert "'README.md' was edited" in fails(capsys, "export", str(run), "--out", str(tmp_path / "out"))


def test_an_upgrade_takes_no_project_for_its_folder(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    recipe = str(runs["sd3"] / "recipe.yaml")
    for name in ("cache", "vae", "pipeline", "report.html"):
        project = tmp_path / f"project-{name}"
        place = project / name if name == "report.html" else project / name / "mine.txt"
        place.parent.mkdir(parents=True)
        place.write_text("mine")
        for verb in ("upgrade", "train-vae"):
            assert f"holds '{name}' and is not a run of davae" in fails(capsys, verb, recipe, "--out", str(project))
        assert [path for path in project.rglob("*") if path.is_file()] == [place]
