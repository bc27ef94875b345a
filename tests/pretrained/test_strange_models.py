"""Models from strangers: what their configs and headers ask for is checked before it takes memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from davae.errors import ModelError, RecipeError
from davae.files.reading import parse_json, read_json, read_object
from davae.plan.dry_run import plan
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.open import load_part, load_pipeline, load_scheduler, read_config
from davae.pretrained.shapes import read_shapes
from davae.pretrained.stored import Bound, bounded, check_config, check_whole, loading, planned, weight_files
from davae.pretrained.text_encoders import reads_silent_t5
from davae.publish.assemble import UPGRADE_FILE, check_fit, load_trained, read_details, read_metadata
from davae.publish.upgrade_file import find_upgrade
from davae.recipes import load_recipe
from davae.runs.checks import check_init
from davae.tasks.base_model import BaseModel
from davae.zoo import resolve, resolve_upgrade


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "model")


def set_config(model: Path, part: str, **values: Any) -> None:
    path = model / part / ("config.json" if part else "model_index.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(model: Path, part: str, change: Any) -> None:
    path = next((model / part).glob("*.safetensors"))
    tensors = load_file(path)
    changed = change(tensors)
    del tensors
    path.unlink()  # it is mapped
    save_file(changed, path, {"format": "pt"})


def refused(message: str, make: Any, *arguments: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        make(*arguments)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("transformer", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("transformer", {"num_layers": 4000}, "asks for more than"),
        ("transformer", {"attention_head_dim": 10**6}, "asks for more than|all memory"),
        ("transformer", {"pos_embed_max_size": 16_000, "caption_projection_dim": 512}, "would take all memory"),
        ("transformer", {"sample_size": 10**9}, "sample_size is 1000000000"),
        ("transformer", {"num_layers": "many"}, "cannot be loaded"),
        ("transformer", {"num_layers": None}, "cannot be loaded"),
        ("transformer", {"num_layers": 0}, "which the config does not ask for"),
        ("transformer", {"patch_size": 0}, "cannot be loaded"),
        ("vae", {"block_out_channels": [10**6, 10**6]}, "asks for more than|cannot be loaded"),
        ("vae", {"block_out_channels": [8] * 200_000}, "200000 entries"),
        ("vae", {"layers_per_block": 3}, "the weights lack"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: found 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor: found nan"),
        ("vae", {"shift_factor": float("inf")}, "shift_factor: found inf"),
        ("vae", {"latents_std": [1.0, 0.0]}, "latents_std: found 0"),
        ("vae", {"x": [[[[[[[[[[[1]]]]]]]]]]]}, "nested more than"),
        ("text_encoder", {"num_hidden_layers": 0}, "which the config does not ask for"),
        ("text_encoder", {"num_hidden_layers": 3}, "the weights lack"),
        ("text_encoder", {"vocab_size": 10**9}, "asks for more than"),
        ("text_encoder_3", {"d_model": 10**7}, "asks for more than"),
        ("", {"text_encoder": ["os", "system"]}, "the library 'os'"),
        ("", {"text_encoder": ["antigravity", "x"]}, "the library 'antigravity'"),
        ("", {"../x": ["diffusers", "AutoencoderKL"]}, "'../x' is not the name of a component"),
        ("", {"vae": ["diffusers", "logging"]}, "no|has a class logging"),
        ("", {"vae": ["diffusers"]}, "expected a library and a class"),
        ("", {"_class_name": "utils"}, "has a class utils"),
        ("", {"_class_name": {"a": 1}}, "expected the name of a pipeline class"),
    ],
)
def test_configs_are_refused_before_they_take_memory(
    model: Path, part: str, values: dict[str, Any], message: str
) -> None:
    set_config(model, part, **values)
    refused(message, load_pipeline, str(model))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1' + b"0" * 5000])
def test_damaged_json_is_one_line(model: Path, part: str, data: bytes) -> None:
    (model / part / "config.json").write_bytes(data)
    refused("config.json", load_pipeline, str(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN or infinite"),
        (
            lambda t: {**t, "decoder.conv_out.bias": torch.full((3,), float("inf"))},
            "decoder.conv_out.bias contains NaN",
        ),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "stored as I8"),
        (lambda t: {k: v for k, v in t.items() if k != "decoder.conv_out.bias"}, "lack decoder.conv_out.bias"),
        (lambda t: {**t, "x.weight": torch.ones(2)}, "hold x.weight, which"),
        (lambda t: {**t, "decoder.conv_out.bias": torch.ones(4)}, "decoder.conv_out.bias"),
        (lambda t: {}, "the weights lack|cannot be loaded"),
    ],
)
def test_weights_that_do_not_belong_to_their_config(model: Path, change: Any, message: str) -> None:
    change_weights(model, "vae", change)
    refused(message, load_part, str(model), "vae", "AutoencoderKL")
    refused(message, load_autoencoder, str(model))


def test_files_that_are_no_weights(model: Path) -> None:
    file = next((model / "vae").glob("*.safetensors"))
    whole = file.read_bytes()
    for data in (b"", b"\0" * 8, whole[:50], whole[:5000], whole[:-100], b"\xff" * 8 + whole, b"PK\3\4" + whole):
        file.write_bytes(data)
        refused("is damaged|no tensors|lack", load_part, str(model), "vae", "AutoencoderKL")
    file.unlink()
    refused("no .safetensors file", load_part, str(model), "vae", "AutoencoderKL")
    torch.save({"a": torch.ones(1)}, model / "vae" / "diffusion_pytorch_model.bin")
    refused("is a pickle", load_part, str(model), "vae", "AutoencoderKL")
    refused("is a pickle", load_pipeline, str(model))
    for name in ("../../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "none.safetensors", "", 5):
        index = {"metadata": {}, "weight_map": {"a": name}}
        (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        refused("index.json", weight_files, model / "vae", "x")
    shutil.rmtree(model / "vae")
    refused("vae", load_pipeline, str(model))


def test_damaged_schedulers_and_tokenizers(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000000000000}')
    refused("num_train_timesteps", load_scheduler, str(model))
    refused("num_train_timesteps", load_pipeline, str(model))
    shutil.copy(model / "model_index.json", model / "scheduler" / "scheduler_config.json")
    with loading("x"):
        load_scheduler(str(model))
    for data in ("{", "{}", '{"version": "1.0", "model": 5}'):
        (model / "tokenizer" / "tokenizer.json").write_text(data)
        refused("cannot be loaded", load_pipeline, str(model))


def test_shapes_of_strange_configs(model: Path) -> None:
    assert read_shapes(str(model)).channels == 4
    for part, values in (
        ("transformer", {"in_channels": "x"}),
        ("transformer", {"in_channels": None}),
        ("transformer", {"patch_size": []}),
        ("vae", {"latent_channels": {}}),
        ("vae", {"block_out_channels": 5}),
        ("", {"vae": "x"}),
        ("", {"vae": []}),
        ("", {"vae": None}),
        ("", {"transformer": [1, 2]}),
    ):
        path = model / part / ("config.json" if part else "model_index.json")
        before = path.read_text()
        set_config(model, part, **values)
        refused(".", read_shapes, str(model))
        path.write_text(before)


def test_what_is_planned_is_bounded() -> None:
    with pytest.raises(ModelError, match="asks for more than"), planned("x"):
        torch.nn.Linear(10**7, 10**7)
    with pytest.raises(ModelError, match="asks for more than"), bounded(Bound(modules=1000), "x"):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3000)))
    with bounded(Bound(100), "x"):
        torch.nn.Linear(5, 5)
    torch.nn.Linear(50, 50)  # the bound ends with its block
    old = ["text_model.embeddings.position_ids", "lm_head.weight", "caption_projection.y_embedding"]
    check_whole({"unexpected_keys": old}, "x")
    check_config({"sample_size": 128, "num_layers": 38, "rope_theta": 10_000, "latents_mean": None}, "x")


def test_json_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": 1}')
    assert read_json(tmp_path / "a") == {"a": 1}
    refused("more than 0 MiB", read_json, tmp_path / "a", ModelError, 3)
    refused("does not exist", read_json, tmp_path / "b")
    refused("not a file", read_json, tmp_path)
    with pytest.raises(RecipeError, match="x: not valid JSON"):
        parse_json("{", "x", RecipeError)
    (tmp_path / "a").write_text("[1]")
    refused("found a list", read_object, tmp_path / "a")
    refused("nothing there", lambda: (_ for _ in ()).throw(ModelError("nothing there")))
    with pytest.raises(ModelError, match="cannot be loaded: bare"), loading("x"):
        raise Exception("bare")
    with pytest.raises(KeyboardInterrupt), loading("x"):
        raise KeyboardInterrupt
    assert read_config("sd35-medium", "transformer")["num_layers"]


# -- upgrade files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def upgrade(tmp_path: Path) -> Path:
    return shutil.copytree(resolve_upgrade("micro-upgraded"), tmp_path / "upgrade")


def rewrite(folder: Path, change: Any = lambda t: t, **metadata: str) -> Path:
    file = folder / UPGRADE_FILE
    original = resolve_upgrade("micro-upgraded") / UPGRADE_FILE
    old, tensors = read_metadata(original), load_file(original)
    kept = {k: v for k, v in old.items() if k in ("format", "class", "channels", "lora", "vae")}
    file.unlink()
    save_file(change(tensors), file, {**kept, **metadata})
    return file


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"channels": "[8, 1000000000]"}, r"channels are \[8, 1000000000\]"),
        ({"channels": "[8, 8]"}, "channels are"),
        ({"channels": "[true, 24]"}, "channels are"),
        ({"channels": "{"}, "channels: not valid JSON"),
        ({"channels": "null"}, "channels are"),
        ({"lora": '{"rank": 1000000000}'}, "lora is"),
        ({"lora": '{"rank": 4, "alpha": NaN}'}, "lora is"),
        ({"lora": "[1]"}, "lora is"),
        ({"lora": "{"}, "lora: not valid JSON"),
        ({"vae": '{"id": null, "path": "../../x"}'}, "is not a folder next to it"),
        ({"vae": '{"id": null, "path": "/etc"}'}, "is not a folder next to it"),
        ({"vae": '{"id": null}'}, "is not a folder next to it"),
        ({"vae": "[]"}, "is not a folder next to it"),
        ({"class": "Popen"}, "transformer class Popen is not supported"),
    ],
)
def test_metadata_of_strange_upgrade_files(upgrade: Path, metadata: dict[str, str], message: str) -> None:
    rewrite(upgrade, **metadata)
    refused(message, find_upgrade, str(upgrade))


def test_tensors_of_strange_upgrade_files(upgrade: Path) -> None:
    recipe = load_recipe("micro", [f"init={upgrade}"])
    check_init(recipe, BaseModel.of(recipe).shapes)  # type: ignore[arg-type]
    transformer = load_part(resolve("micro"), "transformer", "SD3Transformer2DModel")
    first = next(iter(load_file(upgrade / UPGRADE_FILE)))
    for change, metadata, message in (
        (lambda t: {k: v for k, v in t.items() if k != first}, {}, "is in only one"),
        (lambda t: {**t, "x": torch.ones(1)}, {}, "'x' is in only one"),
        (lambda t: {k: v for k, v in t.items() if k != "x"}, {"lora": '{"rank": 60000}'}, "has shape"),
        (lambda t: t, {"lora": "null"}, "is in only one"),
        (lambda t: t, {"lora": '{"rank": 64}', "channels": "[8, 60000]"}, "has shape"),
    ):
        file = rewrite(upgrade, change, **metadata)
        refused(message, check_fit, file, type(transformer).__name__, transformer.config)
    file = rewrite(upgrade, lambda t: {k: v * float("inf") for k, v in t.items()}, channels="[8, 24]")
    refused("not finite numbers", load_trained, transformer, file)
    assert read_details(file, read_metadata(file)).channels == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage2.lora.rank=8", r"stage2.lora: .rank: 8.*set stage2.lora to it"),
        ("stage2.lora.alpha=3", r"stage2.lora: .rank: 64, alpha: 3"),
        ("stage2.lora=null", "stage2.lora: null"),
        ("detail_channels=8", "init: .*set detail_channels to 16"),
        ("downsample=bicubic", "init: .*downsample antialias"),
        ("init=nowhere", "nowhere"),
    ],
)
def test_an_upgrade_to_go_on_from_is_checked_in_the_dry_run(override: str, message: str) -> None:
    recipe = load_recipe("micro", ["init=micro-upgraded", override])
    with pytest.raises((RecipeError, ModelError), match=message):
        plan(recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [10**12, 10**30, 21, 0, -1, "many", True, None])
def test_a_tokenizer_longer_than_its_encoder_is_refused(length: Any, model: Path):
    path = model / "tokenizer" / "tokenizer_config.json"
    read = json.loads((model / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    wrong = read + 1 if length == 21 else length
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": wrong}))
    refused("tokenizer of model .*(model_max_length is|cannot be loaded)|cannot be loaded", load_pipeline, str(model))


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"\x08", b""]
)
def test_a_text_encoder_that_is_cut_off_is_named(model: Path, content: bytes) -> None:
    (model / "text_encoder_3" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model: text_encoder_3/model\.safetensors cannot be loaded: "):
        reads_silent_t5(str(model))
