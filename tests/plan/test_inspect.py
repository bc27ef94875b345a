"""davae inspect, presets and dry runs: closed forms, published sizes, measured memory, bad input."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BUILDERS
from torch import nn
from typer.testing import CliRunner

from davae.backbones.classes_by_name import model_class
from davae.backbones.families import FAMILIES
from davae.cli import app
from davae.cost.flops import autoencoder_flops, count, count_flops, meta_transformer, transformer_flops
from davae.cost.memory import LiveBytes, fake_mode, stage2_memory
from davae.errors import ModelError, RecipeError
from davae.plan.counted import count_figures
from davae.plan.dry_run import plan
from davae.plan.figures import check_resolution, token_plan
from davae.plan.inspect import inspect_model
from davae.pretrained.offline import readable
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import BaseShapes, patch_size, read_shapes
from davae.pretrained.text_encoders import text_encoders
from davae.recipes import Recipe, load_recipe, shipped_recipes
from davae.recipes.sections import Lora, Stage2
from davae.runs.checks import check_recipe
from davae.tasks.base_model import BaseModel
from davae.vae.base import AUTOENCODERS
from davae.zoo.presets import find_preset, presets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def model_part(name: str) -> dict:
    parts = presets()[name].parts
    return parts.get("transformer") or parts["unet"]


# -- FLOPs by hand ---------------------------------------------------------------------------------------------


def test_kinds_of_work_are_told_apart():
    """x (L,w): a linear is 2Lw^2, attention 4L^2w, a k x k convolution 2k^2 c_in c_out a position."""

    def run() -> None:
        x = torch.empty(1, 2, 10, 8)
        nn.functional.scaled_dot_product_attention(x, x, x)
        nn.functional.linear(torch.empty(1, 10, 8), torch.empty(6, 8))
        nn.functional.conv2d(torch.empty(1, 4, 5, 5), torch.empty(3, 4, 3, 3), padding=1)

    with torch.device("meta"):
        flops = count_flops(run)
    assert flops.attention == 2 * 2 * 2 * 10 * 10 * 8
    assert flops.linear == 2 * 10 * 8 * 6
    assert flops.convolution == 2 * 9 * 4 * 3 * 25
    assert flops.total == flops.attention + flops.linear + flops.convolution


def test_flux_flops_by_hand():
    """Two double and three single blocks of width w on N image and T text tokens, written out from the architecture."""
    width, heads, text, channels = 64, 2, 512, 8
    config = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 4 * channels,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": heads,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 24,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    }
    row = FAMILIES["FluxTransformer2DModel"]
    shapes = BaseShapes(
        row.pipeline, row.class_name, "AutoencoderKL", channels, 8, patch_size(config, row), config, {}
    )
    image = 36  # 12x12 latents, 2x2 of them a token
    both = image + text
    flops = transformer_flops(meta_transformer(shapes), 12)
    assert flops.attention == 5 * 4 * both**2 * width
    tokens = 2 * (4 * width**2 + 8 * width**2) * both  # qkv and output, and a feed-forward four times as wide
    modulation = 2 * 2 * 6 * width**2
    single = 2 * ((3 + 4) * width**2 + 5 * width**2) * both + 2 * 3 * width**2
    ends = 2 * (4 * channels * width * image * 2 + 48 * width * text + 2 * width**2)
    times = 2 * (256 * width + width**2 + 24 * width + width**2)
    assert flops.linear == 2 * (tokens + modulation) + 3 * single + ends + times
    assert flops.convolution == 0


def test_autoencoder_flops_are_those_of_its_halves():
    from conftest import tiny_autoencoder

    with torch.device("meta"):
        vae = tiny_autoencoder()
        encode, decode = autoencoder_flops(vae, 32)
        assert encode == count_flops(lambda: vae.encoder(torch.empty(1, 3, 32, 32)))
        assert decode == count_flops(lambda: vae.decoder(torch.empty(1, 4, 16, 16)))


# -- presets ---------------------------------------------------------------------------------------------------


UNLIKE_PUBLISHED = {  # why a class has another number of parameters than the paper or the model card says
    "sd35-medium": 2.243,  # the published 2.5 counts the table of positions, 384*384*1536, which is no parameter in diffusers
    "dit-xl-2-256": 0.750,  # diffusers' class has embeddings of time and class in every block, the official one shares them
    "dit-xl-2-512": 0.750,
}


@pytest.mark.parametrize("name", presets())
def test_presets_have_the_published_number_of_parameters(name: str):
    config = model_part(name)
    with torch.device("meta"):
        billions = count(model_class(config["_class_name"]).from_config(config).parameters()) / 1e9
    expected = UNLIKE_PUBLISHED.get(name, presets()[name].parameters)
    assert billions == pytest.approx(expected, rel=0.005 if name in UNLIKE_PUBLISHED else 0.03)
    if name == "sd35-medium":
        assert billions + 384 * 384 * 1536 / 1e9 == pytest.approx(presets()[name].parameters, rel=0.02)


READ_VALUES = (
    "ZImage",
    "Lumina2",
    "LuminaNextDiT2D",
    "CogView4",
    "QwenImage21",
    "HiDreamImage",
    "HunyuanDiT2D",
    "Krea2",
)


READ_ALWAYS = ("ZImage", "HiDreamImage")  # lengths, and experts; the others take a minute together


@pytest.mark.parametrize(
    "name", [n if n in READ_ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in READ_VALUES]
)
def test_models_that_read_lengths_or_experts_off_tensors_are_inspected(name: str, tmp_path: Path):
    """While memory is rehearsed, tensors hold no values."""
    next(build for kind, build in BUILDERS.items() if kind in (f"{name}Transformer2DModel", f"{name}Model"))(tmp_path)
    figures = inspect_model(str(tmp_path), 128).figures
    assert figures["stage2_lora_peak_bytes"] > 0
    assert figures["upgraded_sampling_peak_bytes"] > 0


def test_shared_parts_have_the_published_number_of_parameters():
    published = {
        ("sd35-medium", "text_encoder"): 123.65e6,
        ("sd35-medium", "text_encoder_2"): 694.66e6,
        ("sd35-medium", "text_encoder_3"): 4.762e9,
        ("sana15-1.6b", "text_encoder"): 2.614e9,
        ("hunyuan-dit", "text_encoder"): 350e6,
        ("hunyuan-dit", "text_encoder_2"): 1.67e9,
        ("qwen-image", "text_encoder"): 8.29e9,
        ("flux2-dev", "text_encoder"): 24.0e9,
    }
    for name in dict.fromkeys(name for name, _ in published):
        for encoder in text_encoders(name, model_part(name)):
            if (name, encoder.component) in published:
                size = count(encoder.on_meta().parameters())
                assert size == pytest.approx(published[name, encoder.component], rel=0.01)
    for name, millions in (
        ("sd15", 83.65),
        ("sd35-medium", 83.82),
        ("sana15-1.6b", 312.25),
        ("lightningdit-xl", 69.8),
    ):
        vae = presets()[name].parts["vae"]
        with torch.device("meta"):
            assert count(model_class(vae["_class_name"]).from_config(vae).parameters()) / 1e6 == pytest.approx(
                millions, rel=0.001
            )


@pytest.mark.parametrize("name", presets())
def test_presets_read_as_folders_do(name: str):
    preset = presets()[name]
    kinds = model_part(name)["_class_name"], preset.parts["vae"]["_class_name"]
    assert model_class(preset.pipeline)
    assert model_class(preset.parts["scheduler"]["_class_name"])
    if kinds[0] in FAMILIES and FAMILIES[kinds[0]].trains and kinds[1] in AUTOENCODERS:
        shapes = read_shapes(name)
        assert (shapes.pipeline_class, shapes.transformer_class, shapes.vae_class) == (preset.pipeline, *kinds)
        check_resolution(shapes, preset.resolution * 2, 2)
    with pytest.raises(ModelError, match=r"is a preset, configs without weights; give"):
        load_pipeline(name)


def test_a_hub_id_out_of_reach_is_read_from_its_preset():
    assert readable("sd35-medium") == ("sd35-medium", "")
    name, note = readable("stabilityai/stable-diffusion-3.5-medium")
    assert name == "sd35-medium"
    assert "the hub did not give stabilityai/stable-diffusion-3.5-medium" in note
    assert readable("nobody/knows-this") == ("nobody/knows-this", "")
    assert find_preset("nobody/knows-this") is None


def test_prompts_are_as_long_as_the_pipelines_pad_them():
    lengths = {e.component: e.tokens for e in text_encoders("sd35-medium", model_part("sd35-medium"))}
    assert lengths == {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
    assert [e.tokens for e in text_encoders("flux1-dev", model_part("flux1-dev"))] == [77, 512]
    assert [e.tokens for e in text_encoders("hunyuan-dit", model_part("hunyuan-dit"))] == [77, 256]
    assert text_encoders("lightningdit-xl", model_part("lightningdit-xl")) == []


# -- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_of_the_embedded_model(tmp_path: Path):
    runner = CliRunner()
    result = runner.invoke(
        app, ["inspect", "micro", "--resolution", "128", "--steps", "30", "--json", str(tmp_path / "f.json")]
    )
    assert result.exit_code == 0, result.output
    f = json.loads((tmp_path / "f.json").read_text())
    parts: list[str] = []
    now = count_figures("micro", None, 2, None, 30, parts.append)
    assert f == now, "run benchmarks/counts.py"
    assert parts[0] == "reading configs"
    assert {"memory of stage 1", "memory of stage2 lora", "phases of an upgrade"} < set(parts)
    assert [phase["name"] for phase in f["phases"]] == ["stage1", "cache", "stage2", "export", "report", "sampling"]
    assert all(phase["fits"] for phase in f["phases"])
    assert (f["native_tokens"], f["upgraded_tokens"], f["detail_channels"]) == (256, 64, 8)
    tokens = token_plan(read_shapes(str(ROOT / "src/davae/zoo/micro/base")), 128, 2)
    assert (f["native_flops"], f["upgraded_flops"], f["bound"]) == (
        tokens.native_flops,
        tokens.upgraded_flops,
        tokens.bound,
    )
    kinds = ("attention", "linear", "convolution")
    for part in ("native", "upgraded", "text_encoder", "native_vae_decode", "upgraded_vae_encode"):
        assert f[f"{part}_flops"] == sum(f[f"{part}_{kind}_flops"] for kind in kinds)
    text = 2 * sum(f[f"text_encoder{number}_flops"] for number in ("", "_2", "_3"))
    for name in ("native", "upgraded"):
        whole = text + 30 * 2 * f[f"{name}_flops"] + f[f"{name}_vae_decode_flops"]
        assert f[f"{name}_picture_flops"] == whole
    assert f["picture_bound"] == f["native_picture_flops"] / f["upgraded_picture_flops"]
    assert f["stage2_full_checkpointed_optimizer_bytes"] == 2 * 4 * f["trained_parameters_full"]
    assert f["upgraded_sampling_peak_bytes"] > f["upgraded_sampling_weights_bytes"]
    assert f["notes"] == []


def test_inspect_lists_presets_and_suggests_the_nearest():
    runner = CliRunner()
    listed = runner.invoke(app, ["inspect"]).output
    assert all(name in listed for name in presets())
    with pytest.raises(
        ModelError,
        match=r"'sd3.5-medium' is not a folder here, a preset or .*did you mean sd35-medium .*\? `davae inspect`",
    ):
        inspect_model("sd3.5-medium", 1024)
    with pytest.raises(ModelError, match="did you mean micro-upgraded"):
        inspect_model("micro-upgrade", 1024)


def test_a_family_that_only_expands_says_so():
    name = next((n for n in presets() if _supported(n) and not FAMILIES[model_part(n)["_class_name"]].trains), None)
    if name is None:
        assert all(FAMILIES[model_part(n)["_class_name"]].trains for n in presets() if _supported(n))
        return
    with pytest.raises(ModelError, match="davae cannot train one yet"):
        read_shapes(name)
    assert read_shapes(name, to_train=False).transformer_class == model_part(name)["_class_name"]


def _supported(name: str) -> bool:
    kind = model_part(name)["_class_name"]
    return (
        presets()[name].parts["vae"]["_class_name"] in AUTOENCODERS
        and kind in FAMILIES
        and (FAMILIES[kind].component == "transformer")
    )


def test_sizes_that_do_not_divide_name_the_nearest():
    with pytest.raises(ModelError, match=r"1000 is not divisible by 32 .*use 992 or 1024"):
        inspect_model("sd35-medium", 1000)
    with pytest.raises(ModelError, match="multiple of the base's 16"):
        inspect_model("sd35-medium", 1024, detail_channels=20)
    with pytest.raises(ModelError, match="scale must be a power of two"):
        inspect_model("sd35-medium", 1056, scale=3)


def test_parts_that_do_not_belong_together(tmp_path: Path):
    flux, sd15 = presets()["flux1-dev"], presets()["sd15"]
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index = {"_class_name": "FluxPipeline", **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part, config in (("transformer", flux.parts["transformer"]), ("vae", sd15.parts["vae"])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"the transformer takes 16 channels and the vae gives 4; .*do not belong together"
    ):
        inspect_model(str(tmp_path), 1024)


# -- memory ----------------------------------------------------------------------------------------------------


def test_live_bytes_by_hand():
    """a (400 bytes) and its square (400) live together; a view is nothing new; freeing counts."""
    with fake_mode():
        outside = torch.empty(100)
        with LiveBytes() as live:
            a = outside + 1
            view = a.view(10, 10).t()
            b = view * view
            assert (live.now, live.peak) == (800, 800)
            del a, view
            assert live.now == 400
            c = b @ b
            assert (live.now, live.peak) == (800, 800)
            assert live.flops == 2 * 10**3
            del b, c
        assert live.now == 0


def test_checkpointing_and_batches_show_in_the_estimate():
    from davae.latent import LatentLayout

    shapes, layout = read_shapes(str(ROOT / "src/davae/zoo/micro/base")), LatentLayout(8, 8)

    def step(**changes: object):
        settings = Stage2.model_validate({"max_steps": 1, "batch_size": 4, "lora": Lora(rank=8), **changes})
        return stage2_memory(shapes, layout, 16, settings, mixed=False)

    plain, double = step(), step(batch_size=8)
    assert double.activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert double.flops == pytest.approx(2 * plain.flops, rel=0.01)
    checkpointed = step(gradient_checkpointing=True)
    assert checkpointed.activations < 0.5 * plain.activations
    assert 1.2 * plain.flops < checkpointed.flops < 1.6 * plain.flops
    assert plain.optimizer == 2 * plain.gradients == 2 * plain.ema


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(["stage2", "6", "stage1", "8"], id="micro", marks=pytest.mark.slow),
        pytest.param(
            ["cache", "16", "report", "16", "sampling", "8"], id="micro, without training", marks=pytest.mark.slow
        ),
        pytest.param(["report@sd35-medium", "1"], id="full width, without training", marks=pytest.mark.slow),
        pytest.param(["stage2@sd35-medium", "2", "stage1@sd35-medium", "1"], id="full width", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_within_15_percent_of_a_real_run(stages: list[str]):
    """Each phase's real code, in a process of its own; the stages through the training loop."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/peak_memory.py"), *stages]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(stages) / 2
    for line in lines:
        found = json.loads(line)
        assert found["estimated"] == pytest.approx(found["measured"], rel=0.15), line


# -- recipes ---------------------------------------------------------------------------------------------------

HUB_RECIPES = [
    name
    for name in shipped_recipes()
    if isinstance(recipe := load_recipe(name), Recipe) and find_preset(recipe.base.model or "") is not None
]


def test_the_recipes_of_the_issue_ship():
    wanted = {"sd35-medium-1k", "sd35-medium-2k", "flux1-dev-2k", "sana-2k", "pixart-sigma-2k", "hunyuan-dit-2k"}
    assert wanted | {"sdxl-2k", "qwen-image-2k"} <= set(HUB_RECIPES)


@pytest.mark.parametrize("name", HUB_RECIPES)
def test_recipes_fit_the_real_config(name: str):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.hardware is not None
    model, _ = readable(recipe.base.model or "")
    kind = model_part(model)["_class_name"]
    if not (
        kind in FAMILIES and FAMILIES[kind].trains and presets()[model].parts["vae"]["_class_name"] in AUTOENCODERS
    ):
        with pytest.raises(ModelError, match=r"cannot train one yet|is not supported|has no transformer"):
            plan(recipe)
        return
    shapes = read_shapes(model)
    layout = check_recipe(recipe, BaseModel.of(recipe, configs=model))
    assert layout.channels == shapes.channels + recipe.detail_channels
    for stage, pictures in ((recipe.stage1, 16), (recipe.stage2, 128)):  # Tab. S1
        assert stage.batch_size * stage.accumulation == pictures  # batch_size is that of all processes together
        assert stage.batch_size % recipe.hardware.count == 0


def test_a_dry_run_ends_in_memory_and_time_for_the_stated_gpus():
    """The cheapest SD3.5-M there is to rehearse: full tuning in one pass, no checkpointing, no discriminator."""
    light = [
        "stage2.lora=null",
        "stage2.gradient_checkpointing=false",
        "stage2.batch_size=1",
        "stage2.accumulation=1",
        "stage1.lambda_adv=0",
    ]
    recipe = load_recipe("sd35-medium-1k", light)
    assert isinstance(recipe, Recipe)
    found = plan(recipe)
    f = found.figures
    assert "the hub did not give" in found.notes[0]
    assert f["speedup_bound"] == pytest.approx(4.6, abs=0.05)
    assert f["stage2_trainable_parameters"] == f["stage2_parameters"]
    # prompts are embedded in the step: text encoders and autoencoder in float32, and nothing of the base that idles
    assert 4 * (5580.6e6 + 83.8e6) / 2**30 < f["stage2_rest_of_pipeline_gib"] < 1.05 * 4 * (5580.6e6 + 83.8e6) / 2**30
    table = {phase.name: phase.as_dict() for phase in found.phases}
    assert f["stage2_memory_gib"] == table["stage2"]["device_gib"]
    assert f["stage2_fits"].startswith("fits h100-80gb")
    step = f["stage2_petaflops"] * 1e15 / recipe.stage2.max_steps
    assert step == pytest.approx(3 * 2.443e12, rel=0.03)  # a backward pass is two forward ones
    assert f["stage2_days"] == pytest.approx(step * recipe.stage2.max_steps / (0.4 * 989e12) / 86400, abs=0.001)


def test_unknown_gpus_are_named():
    with pytest.raises(RecipeError, match=r"hardware.gpu: use one of rtx4090-24gb, .*'h100'"):
        load_recipe("sd35-medium-1k", ["hardware.gpu=h100"])


# -- the table of families -------------------------------------------------------------------------------------


def test_the_table_of_families_is_what_its_generator_gives():
    module = runpy.run_path(str(ROOT / "docs" / "make_family_table.py"))
    outcomes = json.loads(module["OUTCOMES"].read_text(encoding="utf-8"))
    assert module["TARGET"].read_text(encoding="utf-8") == module["page"](outcomes), "run docs/make_family_table.py"
    assert "failed" not in module["TARGET"].read_text(encoding="utf-8")


def test_a_size_beyond_the_table_of_positions_is_one_line(tmp_path: Path):
    """What a native pass there would need is not in the model: said, with the size, and no traceback."""
    BUILDERS["CogView3PlusTransformer2DModel"](tmp_path / "base")
    with pytest.raises(ModelError, match=r"base at 512 px: CogView3-Plus knows positions of 8 tokens a side"):
        inspect_model(str(tmp_path / "base"), 512, 2, None, 30)
    with pytest.raises(ModelError, match=r"micro at 256 px: .*pos_embed_max_size"):
        inspect_model("micro", 256, 2, None, 30)
