"""stage2.detail_offset: a detail with a time of its own, from its draws to samples, exports and enlarging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import picture, tiny_transformer
from safetensors import safe_open
from safetensors.torch import load_file
from test_lightning_dit import CONFIGS, random_model
from test_training import run_cli, training_records

import davae
from davae import ClassConditionalPipeline, LatentLayout, LightningDiT, expand_transformer
from davae.backbones.detail_time import OFFSET
from davae.backbones.families.dit import LightningDiTCall
from davae.backbones.trainable import choose_trainable
from davae.data.images import to_tensor
from davae.errors import ModelError, RecipeError
from davae.latent import LatentStatistics
from davae.losses.flow_matching import FlowMatching, shift_timestep, x0_ratio_weight
from davae.publish.assemble import read_details
from davae.recipes.sections import Lora, Stage2
from davae.runs.checks import check_timesteps
from davae.sample.ode import solve_ode
from davae.tasks.conditioning import ClassConditioning
from davae.tasks.noising import choose_objective
from davae.tasks.solving import solve
from davae.tasks.stage2 import Stage2Task
from davae.tasks.two_levels import TwoLevels, error_weight_by_group
from davae.train.loop import Progress
from davae.train.random import SampleRandom

LAYOUT = LatentLayout(4, 8)
CPU = torch.device("cpu")


def draws(count: int = 6) -> SampleRandom:
    return SampleRandom(0, "stage2", 0, 0, count)


def offset_model(name: str = "lightning") -> tuple[LightningDiT, LightningDiT]:
    base = random_model(**CONFIGS[name])
    return base, expand_transformer(base, 8, detail_offset=0.15)


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning", "p2", "without-shift"])
def test_step_0_is_the_pretrained_model_at_the_base_s_time(name: str):
    base, expanded = offset_model(name)
    z, z_d, y = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 8, 8, 8).double(), torch.tensor([0, 3, 5])
    times = torch.rand(3, 2)
    x = LAYOUT.join(z, z_d)
    with torch.no_grad():
        velocity, detail = LAYOUT.split(expanded(x, times, y).sample)
        torch.testing.assert_close(velocity, base(z, times[:, 0], y).sample, atol=1e-12, rtol=0)
        assert not detail.any()
        # equal to the bit to an expansion without a time of the detail's own, whatever that time is
        plain = expand_transformer(base, 8)
        assert torch.equal(plain(x, times[:, 0], y).sample, expanded(x, times, y).sample)


def test_the_detail_s_time_reaches_every_block_and_the_detail_s_head_alone():
    _, model = offset_model()
    x, y = torch.randn(2, 12, 8, 8).double(), torch.tensor([1, 2])
    for parameter in model.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    one, two = torch.tensor([[0.3, 0.1], [0.6, 0.2]]), torch.tensor([[0.3, 0.05], [0.6, 0.2]])
    with torch.no_grad():
        (z, z_d), (same, other) = (LAYOUT.split(model(x, times, y).sample) for times in (one, two))
        assert torch.equal(z, same)  # W_res is zero: its time reaches its head alone
        assert not torch.equal(z_d[0], other[0])
        assert torch.equal(z_d[1], other[1])
        for parameter in model.detail_time.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.2)
        z, same = (LAYOUT.split(model(x, times, y).sample)[0] for times in (one, two))
        assert not torch.equal(z[0], same[0])
        # one time is the same time for both
        single = torch.tensor([0.3, 0.6])
        assert torch.equal(model(x, single, y).sample, model(x, single[:, None].expand(2, 2), y).sample)


def test_the_modulation_is_eq_13():
    _, model = offset_model()
    for parameter in model.detail_time.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.2)
    times, y = torch.tensor([[0.3, 0.1]]), torch.tensor([1])
    seen: list[Any] = []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args))
    with torch.no_grad():
        model(torch.randn(1, 12, 8, 8).double(), times, y)
        phi = [model.t_embedder(times[:, n], torch.float64) for n in (0, 1)]
        _, condition, _, added = seen[0]
        torch.testing.assert_close(condition, phi[0] + model.y_embedder(y))
        own: Any = model.detail_time.modulation[1]  # type: ignore[union-attr]
        torch.testing.assert_close(added, torch.nn.functional.silu(phi[1]) @ own.weight.T + own.bias)


def test_trained_weights_are_those_of_lora_and_the_new_modulation():
    _, model = offset_model()
    choose_trainable(model, Lora(rank=2))
    whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert whole == {
        *(f"x_embedder.proj.{part}" for part in ("weight", "bias")),
        *(f"final_layer.linear.{part}" for part in ("weight", "bias")),
        *(f"detail_time.modulation.1.{part}" for part in ("weight", "bias")),
    }


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="all channels of a SD3Transformer2DModel share one time"):
        expand_transformer(tiny_transformer(), 8, detail_offset=0.15)
    with pytest.raises(ValueError, match="predicts epsilon; a velocity alone"):
        expand_transformer(random_model(prediction_type="epsilon"), 8, detail_offset=0.15)


# -- the training ----------------------------------------------------------------------------------------------------


def test_levels_are_drawn_by_the_clock_and_the_recipe_s_density():
    objective = FlowMatching(mean=0.2, std=0.9, shift=2.0)
    levels = TwoLevels(LAYOUT, objective, (0.0, 0.6), 0.15)
    t = levels.noise(torch.zeros(500, 12, 1, 1), draws(500)).t
    again = draws(500)
    share = FlowMatching(0.2, 0.9).draw(again.samples)
    again.normal(12, 1, 1)
    delta = 0.6 * again.uniform()
    clock = (1 + delta) * share
    torch.testing.assert_close(t[:, 0], shift_timestep((clock - delta).clamp(min=0), 2.0))
    torch.testing.assert_close(t[:, 1], shift_timestep(clock.clamp(max=1), 2.0))
    assert (t[:, 0] <= t[:, 1]).all()
    assert 0 < int((t[:, 0] == 0).sum()) < 250


def test_each_group_is_noised_at_its_level():
    latents = torch.randn(6, 12, 4, 4)
    noised = TwoLevels(LAYOUT, FlowMatching(), (0.2, 0.6), 0.3).noise(latents, draws())
    noise = latents + noised.target
    for group, data, n, level in zip(
        LAYOUT.split(noised.x_t), LAYOUT.split(latents), LAYOUT.split(noise), noised.t.T, strict=True
    ):
        s = level.view(-1, 1, 1, 1)
        torch.testing.assert_close(group, (1 - s) * data + s * n, atol=1e-5, rtol=1e-5)
    assert noised.clean is not None
    assert torch.equal(noised.clean, noised.t[:, 0] == 0)


def test_weights_are_each_group_s_at_its_level():
    t = torch.tensor([[0.1, 0.4], [0.5, 0.9]])
    weight = error_weight_by_group(FlowMatching(), t, LAYOUT, min_snr_gamma=None, x0_ratio_max=5.0)
    assert weight is not None
    for group, level in zip(LAYOUT.split(weight), t.T, strict=True):
        torch.testing.assert_close(group, x0_ratio_weight(level.view(2, 1, 1, 1), 5.0).expand_as(group))
    assert error_weight_by_group(FlowMatching(), t, LAYOUT, min_snr_gamma=None, x0_ratio_max=None) is None


class Seen(torch.nn.Module):
    def __init__(self, transformer: LightningDiT):
        super().__init__()
        self.transformer, self.inputs = transformer, []

    def forward(self, x, t, labels, return_dict):
        self.inputs.append((x, t))
        return self.transformer(x, t, labels, return_dict=return_dict)


def class_task(**settings: Any) -> Stage2Task:
    torch.manual_seed(1)
    base = random_model(torch.float32)
    stage2 = Stage2(max_steps=4, batch_size=6, **settings)
    transformer = expand_transformer(base, 8, detail_offset=stage2.detail_offset)
    statistics = LatentStatistics(torch.zeros(1, 12, 1, 1), torch.ones(1, 12, 1, 1))
    task = Stage2Task(
        stage2, LAYOUT, transformer, (), statistics, ClassConditioning(transformer, 5, CPU), FlowMatching(), CPU  # type: ignore[arg-type]
    )  # fmt: skip
    task.modules["transformer"] = Seen(transformer)
    return task


def loss_of(task: Stage2Task, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    latents = torch.randn(count, 12, 8, 8)
    total, _ = task.loss("transformer", {"latents": latents, "conditions": [1] * count}, 4, draws(count))
    return (total, latents, *task.modules["transformer"].inputs[-1])  # type: ignore[index, return-value]


def test_a_range_of_zero_trains_as_without_an_offset_to_the_bit():
    plain, _, x, t = loss_of(class_task())
    task = class_task(detail_offset=0.1)
    task.levels = TwoLevels(LAYOUT, FlowMatching(), (0.0, 0.0), 0.1)
    total, _, same, both = loss_of(task)
    assert torch.equal(both, t[:, None].expand(-1, 2))
    assert torch.equal(x, same)
    assert torch.equal(plain, total)


def test_a_base_without_noise_is_not_scored_and_a_clean_one_has_the_time_of_data():
    task = class_task(detail_offset=0.3, clean_base=0.5)
    _, latents, x, t = loss_of(task)
    z, _ = LAYOUT.split(latents)
    clean = (LAYOUT.split(x)[0] == z).flatten(1).all(1)
    assert torch.equal(clean, t[:, 0] == 1)  # LightningDiT's time of data
    assert 10 < int(clean.sum()) < 35
    fewer = class_task(detail_offset=0.3)
    _, _, other, s = loss_of(fewer)
    assert torch.equal(t[:, 1], s[:, 1])  # the share is drawn last
    assert torch.equal(LAYOUT.split(x)[1], LAYOUT.split(other)[1])
    assert 0 < int((s[:, 0] == 1).sum()) < int(clean.sum())
    prediction = torch.zeros_like(latents).requires_grad_()
    task.conditioning.predict = lambda *_: prediction  # type: ignore[method-assign]
    loss_of_fixed, _ = task.loss("transformer", {"latents": latents, "conditions": [1] * 40}, 4, draws(40))
    loss_of_fixed.backward()
    assert prediction.grad is not None
    scored = (LAYOUT.split(prediction.grad)[0] != 0).flatten(1).any(1)
    assert torch.equal(scored, ~clean)
    assert bool((LAYOUT.split(prediction.grad)[1] != 0).flatten(1).any(1).all())


@pytest.mark.parametrize(("scale", "alike"), [(2.5, 2.5), (0.5, 1.0), (0.0, 1.0)])
def test_progress_is_drawn_as_the_pipeline_draws(scale: float, alike: float):
    task = class_task(detail_offset=0.15)
    transformer = task.transformer
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    noise = torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        ours = solve(task.conditioning, task, noise, [1, 2], 7, scale)
        theirs = solve_ode(transformer, noise, torch.tensor([1, 2]), 8, cfg_scale=scale)
        known = solve_ode(transformer, noise, torch.tensor([1, 2]), 8, cfg_scale=alike)
    assert torch.equal(theirs, known)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs, solve_ode(transformer, noise, torch.tensor([1, 2]), 8, cfg_scale=scale,
                              times=torch.linspace(0, 1, 8)), atol=1e-3)  # fmt: skip


def test_the_call_turns_both_times_round():
    _, model = offset_model()
    for parameter in model.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, y, t = torch.randn(1, 12, 8, 8).double(), torch.tensor([1]), torch.tensor([[0.2, 0.7]])
    with torch.no_grad():
        ours = LightningDiTCall().predict(model, model.config, x, t, (y,))
        torch.testing.assert_close(ours, -model(x, torch.tensor([[0.8, 0.3]]), y).sample, atol=1e-6, rtol=1e-6)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detail_offset": 0.7}, r"detail_offset is 0.7, outside detail_offset_range \[0.0, 0.6\]"),
        ({"detail_offset": 0.1, "detail_offset_range": (0.2, 0.6)}, "sampled at an offset that it never saw"),
        ({"detail_offset_range": (0.1, 0.6)}, "detail_offset_range without detail_offset has no effect"),
        ({"detail_offset": 0.15, "detail_scale": 0.5}, "both put the base ahead; leave one of them out"),
        ({"detail_offset": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Stage2(max_steps=1, batch_size=1, **changes)


def test_an_objective_that_has_no_levels_of_flow_is_refused():
    from diffusers import DDPMScheduler

    from davae.backbones.families import family_by_class

    objective = choose_objective(DDPMScheduler(), family_by_class("LightningDiT"), "m")
    with pytest.raises(
        RecipeError, match=r"stage2.detail_offset: belongs to flow matching; .*use stage2.detail_scale"
    ):
        check_timesteps(Stage2(max_steps=1, batch_size=1, detail_offset=0.15), objective)


def test_a_family_with_one_time_is_refused(tiny_base: Path, picture_folder: Path, tmp_path: Path):
    from conftest import tiny_upgrade_recipe

    from davae.recipes import Recipe, validate
    from davae.runs.checks import check_recipe
    from davae.tasks.base_model import BaseModel

    values = tiny_upgrade_recipe(tiny_base, picture_folder, stage2__detail_offset=0.15)
    recipe = validate({"kind": "upgrade", **values}, "tiny")
    assert isinstance(recipe, Recipe)
    with pytest.raises(
        RecipeError, match=r"stage2.detail_offset: all channels of a SD3Transformer2DModel share one time"
    ):
        check_recipe(recipe, BaseModel.of(recipe))


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(classes: Path) -> dict[str, Any]:
    from test_class_conditional import base_recipe

    return {
        "name": "tiny-ahead",
        "base": {"resolution": 16, "train": base_recipe()},
        "detail_channels": 8,
        "data": {"source": str(classes), "holdout": 0.3},
        "stage1": {"max_steps": 2, "batch_size": 2, "perceptual": "lite0", "lambda_adv": 0.0},
        "stage2": {
            "max_steps": 4, "batch_size": 4, "detail_offset": 0.15, "clean_base": 0.25, "x0_ratio_max": 5.0,
            "cosine_loss": "faded", "validate_every": 2, "validate_pictures": 2, "lr": 0.01,
        },
        "sampling": {"steps": 2},
        "report": {"holdout_pictures": 2, "timing_repeats": 1},
        "run": {"log_every": 1, "checkpoint_every": 1, "sample_every": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ahead")
    (out / "recipe.in.yaml").write_text(yaml.safe_dump(values))
    run_cli("upgrade", str(out / "recipe.in.yaml"), "--out", str(out / "run"))
    return out / "run"


def test_a_run_leaves_a_pipeline_that_knows_its_offset(finished: Path, tmp_path: Path):
    pipeline = ClassConditionalPipeline.from_pretrained(finished / "pipeline")
    config = pipeline.transformer.config
    assert (config["detail_channels"], config[OFFSET], config["_davae_clean_base"]) == (8, 0.15, 0.25)
    assert bool(pipeline.transformer.detail_time.modulation[1].weight.any())
    with safe_open(finished / "upgrade.safetensors", "pt") as stream:
        metadata = stream.metadata()
    details = read_details(finished / "upgrade.safetensors", metadata)
    assert details.detail_offset == 0.15
    for wrong in ("2.0", '"half"'):
        with pytest.raises(ModelError, match="detail_offset of a LightningDiT"):
            read_details(finished / "upgrade.safetensors", {**metadata, "detail_offset": wrong})
    with pytest.raises(ModelError, match=r"detail_offset of a DiTTransformer2DModel is 0.15; it is damaged"):
        read_details(finished / "u", {**metadata, "class": "DiTTransformer2DModel"})
    # base and upgrade file give the same model as the exported folder
    from davae.pretrained.open import load_pipeline
    from davae.publish.assemble import load_upgraded

    again = load_upgraded(load_pipeline(str(finished / "base" / "pipeline")), finished)
    noise = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(1))

    def draw(pipe: Any, **options: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe("tench", num_inference_steps=5, latents=noise, output_type="latent", **options).images

    drawn = draw(pipeline)
    assert torch.equal(drawn, draw(again))
    assert torch.equal(drawn, draw(pipeline, detail_offset=0.15))
    assert not torch.allclose(drawn, draw(pipeline, detail_offset=0.0))
    z, _ = LAYOUT.split(draw(pipeline, clean_base=True))
    assert torch.equal(z, LAYOUT.split(noise)[0])
    with pytest.raises(ValueError, match=r"detail_offset is 1.5; use a number from 0 to 1"):
        draw(pipeline, detail_offset=1.5)
    base = ClassConditionalPipeline.from_pretrained(finished / "base" / "pipeline")
    with pytest.raises(ValueError, match="all channels of this model share one time"):
        base("tench", num_inference_steps=1, detail_offset=0.1)
    run_cli("sample", str(finished), "tench", "--steps", "3", "--out", str(tmp_path / "drawn"))
    assert list((tmp_path / "drawn").glob("*.png"))


@pytest.mark.parametrize(("clean", "guided"), [(True, [0.5, 0.75]), (False, [0.5, 0.75])])
def test_the_guidance_interval_is_that_of_the_part_that_moves(finished: Path, clean: bool, guided: list[float]):
    """A clean base is at time 1 throughout; the detail is guided from the interval's start on."""
    pipeline = ClassConditionalPipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[int, float]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args: seen.append((len(args[0]), float(args[1][0, 1] if clean else args[1].flatten()[0])))
    )
    pipeline(
        "tench",
        num_inference_steps=4,
        guidance_scale=3.0,
        cfg_interval_start=0.5,
        clean_base=clean,
        detail_offset=0.0,
    )
    assert [time for rows, time in seen if rows == 2] == guided
    assert len(seen) == 4


def test_previews_and_enlarging_know_the_base_s_time(finished: Path):
    pipeline = ClassConditionalPipeline.from_pretrained(finished / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    shown = davae.preview(pipeline, every=1)
    pipeline("tench", num_inference_steps=4, callback_on_step_end=shown)
    assert list(shown.images) == [1, 2, 3, 4]
    image = picture(1, 16, 16)
    z = pipeline.vae.encode_base(to_tensor(image)[None])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    pipeline.transformer.register_forward_pre_hook(lambda model, args: seen.append((args[0][:, :4], args[1])))
    davae.upscale(pipeline, image, "tench", steps=4, guidance_scale=1.0)
    for base, times in seen:  # trained with clean bases: the model is told so
        torch.testing.assert_close(base, z)
        assert times[:, 0].eq(1).all()
    assert [float(times[0, 1]) for _, times in seen] == [0, 0.25, 0.5, 0.75]
    seen.clear()
    davae.upscale(pipeline, image, "tench", steps=4, guidance_scale=1.0, strength=0.5)
    assert float(seen[0][1][0, 0]) == 0  # the base is free at the end: it begins as noise
    assert not torch.allclose(seen[0][0], z)
    pipeline.transformer.register_to_config(_davae_clean_base=0.0)
    seen.clear()
    davae.upscale(pipeline, image, "tench", steps=4, guidance_scale=1.0)
    noise = seen[0][0]
    for base, times in seen:  # else the base is at its own level on its way
        t = float(times[0, 0])
        torch.testing.assert_close(base, t * z + (1 - t) * noise, atol=1e-5, rtol=1e-5)
    assert float(seen[1][1][0, 0]) > float(seen[1][1][0, 1])


def test_an_interrupted_run_goes_on_to_the_bit(values: dict[str, Any], finished: Path, tmp_path: Path):
    from davae.recipes import Recipe, validate
    from davae.runs.upgrade import Upgrade

    recipe = validate({"kind": "upgrade", **values}, "tiny")
    assert isinstance(recipe, Recipe)

    def stop(progress: Progress) -> None:
        if progress.task == "stage2" and progress.step >= 2:
            raise KeyboardInterrupt

    run = Upgrade(recipe, tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.folder.close()
    again = Upgrade(recipe, tmp_path, lambda progress: None)
    again.run()
    again.folder.close()
    assert training_records(tmp_path) == training_records(finished)
    mine, theirs = (load_file(folder / "upgrade.safetensors") for folder in (tmp_path, finished))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_plan_counts_the_second_modulation(values: dict[str, Any]):
    from davae.plan.dry_run import plan
    from davae.recipes import Recipe, validate

    found = []
    for offset in (0.15, 0.0):
        stage2 = {**values["stage2"], "detail_offset": offset}
        recipe = validate({"kind": "upgrade", **values, "stage2": stage2}, "tiny")
        assert isinstance(recipe, Recipe)
        found.append(plan(recipe).figures["stage2_trainable_parameters"])
    assert found[0] - found[1] == 16 * 6 * 16 + 6 * 16


def test_going_on_from_an_upgrade_needs_the_same_kind_of_time(values: dict[str, Any], finished: Path):
    from davae.pretrained.shapes import read_shapes
    from davae.recipes import Recipe, validate
    from davae.runs.checks import check_init

    stage2 = {key: value for key, value in values["stage2"].items() if key != "detail_offset"}
    recipe = validate({"kind": "upgrade", **values, "stage2": stage2, "init": str(finished)}, "tiny")
    assert isinstance(recipe, Recipe)
    with pytest.raises(RecipeError, match=r"stage2.detail_offset: 0, and init goes on from .* with 0.15"):
        check_init(recipe, read_shapes(str(finished / "base" / "pipeline")))
    assert json.loads((finished / "pipeline" / "transformer" / "config.json").read_text())["detail_channels"] == 8
