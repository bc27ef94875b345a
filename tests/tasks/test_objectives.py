"""What a model is trained to predict: closed forms in float64, equality with diffusers' schedulers, who is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from cases import CASES
from cases.stable_diffusion import stable_diffusion
from conftest import tiny_upgrade_recipe
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler

from davae import LatentLayout, expand_transformer, velocity_loss
from davae.backbones.expand import new_weight_masks
from davae.backbones.families import family_by_class
from davae.errors import ModelError, RecipeError
from davae.losses import ddpm
from davae.losses.ddpm import Diffusion, min_snr_weight
from davae.losses.flow_matching import FlowMatching, interpolate, logit_normal, velocity_target, x0_ratio_weight
from davae.pretrained.open import load_scheduler
from davae.pretrained.placement import send
from davae.recipes import validate
from davae.recipes.sections import FlowOptim, Stage2
from davae.runs.checks import check_timesteps
from davae.runs.upgrade import Upgrade
from davae.tasks.noising import (
    Objective,
    choose_objective,
    drop_conditions,
    error_weight,
    flow_matching,
    noise_batch,
)
from davae.tasks.solving import ddim, solve
from davae.train.random import SampleRandom
from davae.train.run_folder import read_metrics

F64 = torch.float64
FLOW = FlowMatching()
SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled_linear, as Stable Diffusion": DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ),
    "zero terminal SNR": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "CogVideoX's shift of the SNR": CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "250 steps": DDPMScheduler(num_train_timesteps=250),
}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_and_v_are_the_scheduler_s(name: str):
    scheduler = SCHEDULERS[name]
    last = len(scheduler.alphas_cumprod) - 1
    t = torch.tensor([0, 1, last // 2, last])
    x, noise = draw(4, 3, 2, 2), draw(4, 3, 2, 2)
    table = scheduler.alphas_cumprod
    assert torch.equal(ddpm.add_noise(x, noise, table, t), scheduler.add_noise(x, noise, t))
    assert torch.equal(ddpm.v_target(x, noise, table, t), scheduler.get_velocity(x, noise, t))
    if name.startswith(("zero", "CogVideoX")):  # pure noise at the end
        assert float((ddpm.add_noise(x, noise, table, t) - noise)[3].abs().max()) < 1e-3
    assert ddpm.add_noise(x.float(), noise.float(), table, t).dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_data(gamma: float):
    """weight * (prediction error)^2 = min(SNR, gamma) * (error of x_0 that follows from it)^2, for every objective."""
    x, noise, error = draw(6, 1, 1, 1), draw(6, 1, 1, 1), draw(6, 1, 1, 1)
    t = torch.tensor([0, 50, 200, 500, 800, 998])
    table = DDPMScheduler().alphas_cumprod.to(F64)
    alpha, sigma = ddpm.signal_and_noise(table, t, x)
    noisy = ddpm.add_noise(x, noise, table, t)
    snr = (alpha / sigma) ** 2
    assert float(snr.min()) < gamma < float(snr.max())
    from_epsilon = (noisy - sigma * (noise + error)) / alpha
    from_v = alpha * noisy - sigma * (ddpm.v_target(x, noise, table, t) + error)
    for prediction, data in (("epsilon", from_epsilon), ("v_prediction", from_v)):
        weight = min_snr_weight(alpha, sigma, gamma, prediction)  # type: ignore[arg-type]
        torch.testing.assert_close(weight * error**2, snr.clamp(max=gamma) * (data - x) ** 2, rtol=1e-9, atol=0)

    t = torch.rand(6, dtype=F64)
    alpha, sigma = (values.to(F64) for values in FLOW.levels(t))
    data = interpolate(x, noise, t) - sigma * (velocity_target(x, noise) + error)
    expected = ((alpha / sigma) ** 2).clamp(max=gamma) * (data - x) ** 2
    weight = min_snr_weight(alpha, sigma, gamma, "flow")
    torch.testing.assert_close(weight * error**2, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("maximum", [1.0, 5.0])
def test_the_authors_sd3_weight_is_that_of_an_x0_loss(maximum: float):
    """weight * (velocity error)^2 = min((1-t)/t, 5) * (error of x_0 that follows from it)^2."""
    x, noise, error = draw(9, 1, 1, 1), draw(9, 1, 1, 1), draw(9, 1, 1, 1)
    t = torch.tensor([0.001, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.99, 1.0], dtype=F64)
    sigma = t.view(-1, 1, 1, 1)
    data = interpolate(x, noise, t) - sigma * (velocity_target(x, noise) + error)
    expected = ((1 - sigma) / sigma).clamp(max=maximum) * (data - x) ** 2
    torch.testing.assert_close(x0_ratio_weight(sigma, maximum) * error**2, expected, rtol=1e-9, atol=1e-15)


def test_the_two_weights_differ_by_a_power_of_the_noise_level():
    sigma = torch.tensor(0.8, dtype=F64)
    assert float(x0_ratio_weight(sigma, 5.0)) == pytest.approx(0.16)
    assert float(min_snr_weight(1 - sigma, sigma, 5.0, "flow")) == pytest.approx(0.04)
    assert float(x0_ratio_weight(torch.zeros((), dtype=F64), 5.0)) == 0.0
    latents = torch.randn(8, 4, 2, 2)
    settings = Stage2(max_steps=1, batch_size=8, x0_ratio_max=5.0)
    draws = SampleRandom(0, "stage2", 0, 0, 8)
    batch = noise_batch(FLOW, latents, draws)
    weight = error_weight(FLOW, batch.t, min_snr_gamma=None, x0_ratio_max=settings.x0_ratio_max)
    assert torch.equal(weight, x0_ratio_weight(batch.t.view(-1, 1, 1, 1), 5.0))  # type: ignore[arg-type]
    assert error_weight(FLOW, batch.t, min_snr_gamma=None, x0_ratio_max=None) is None


def test_one_weight_at_a_time_and_each_for_its_objective():
    with pytest.raises(ValueError, match="min_snr_gamma and x0_ratio_max are two weights of the same loss"):
        Stage2(max_steps=1, batch_size=1, min_snr_gamma=5.0, x0_ratio_max=5.0)
    diffusion = Diffusion(DDPMScheduler().alphas_cumprod, "epsilon")
    with pytest.raises(
        RecipeError, match=r"stage2\.x0_ratio_max: weighs flow matching; .* epsilon; use min_snr_gamma"
    ):
        check_timesteps(Stage2(max_steps=1, batch_size=1, x0_ratio_max=5.0), diffusion)


def test_min_snr_is_finite_in_pure_noise():
    nothing, everything = torch.zeros(1), torch.ones(1)
    weights = [float(min_snr_weight(nothing, everything, 5.0, kind)) for kind in ("epsilon", "v_prediction", "flow")]
    assert weights == [1.0, 0.0, 0.0]


def test_error_weights_go_into_the_total_alone():
    layout = LatentLayout(2, 4)
    prediction, target, weight = draw(3, 6, 2, 2), draw(3, 6, 2, 2), torch.rand(3, 6, 1, 1, dtype=F64)
    loss = velocity_loss(prediction, target, layout, 0.3, weight)
    errors = (prediction - target) ** 2
    base, detail = (weight * errors)[:, :2].sum(), (weight * errors)[:, 2:].sum()
    assert float(loss.total) == pytest.approx(float((base + 0.3 * detail) / (3 * 4 * (2 + 0.3 * 4))), rel=1e-12)
    plain = velocity_loss(prediction, target, layout, 0.3)
    assert (loss.base, loss.detail) == (plain.base, plain.detail)
    one = velocity_loss(prediction, target, layout, 0.3, torch.ones(3, 1, 1, 1))
    assert float(one.total) == pytest.approx(float(plain.total), rel=1e-12)


CHOICES: list[tuple[str, str, dict[str, Any], str]] = [
    ("UNet2DConditionModel", "PNDMScheduler", {}, "epsilon"),
    ("UNet2DConditionModel", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("PixArtTransformer2DModel", "DPMSolverMultistepScheduler", {}, "epsilon"),
    ("DiTTransformer2DModel", "DDIMScheduler", {}, "epsilon"),
    ("HunyuanDiT2DModel", "DDPMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("CogView3PlusTransformer2DModel", "CogVideoXDPMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler", {}, "flow"),
    (
        "SanaTransformer2DModel",
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "flow",
    ),
]


@pytest.mark.parametrize(("family", "scheduler", "options", "expected"), CHOICES)
def test_the_scheduler_says_what_is_predicted(family: str, scheduler: str, options: dict[str, Any], expected: str):
    made = getattr(diffusers, scheduler)(**options)
    objective = choose_objective(made, family_by_class(family), "m")
    assert objective.prediction == expected
    if isinstance(objective, Diffusion):
        assert torch.equal(objective.alphas_cumprod, made.alphas_cumprod)


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("UNet2DConditionModel", "DDPMScheduler", {"prediction_type": "sample"}, "prediction_type 'sample'"),
    ("UNet2DConditionModel", "EDMEulerScheduler", {}, "'epsilon' on continuous noise levels"),
    (
        "UNet2DConditionModel",
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        "'v_prediction' on continuous noise levels",
    ),
    ("SanaTransformer2DModel", "SCMScheduler", {}, "prediction_type 'trigflow'"),
    (
        "UNet2DConditionModel",
        "FlowMatchEulerDiscreteScheduler",
        {},
        "belongs to flow, a UNet2DConditionModel is trained",
    ),
    ("SD3Transformer2DModel", "DDIMScheduler", {}, "belongs to epsilon, a SD3Transformer2DModel is trained by flow"),
]


@pytest.mark.parametrize(("family", "scheduler", "options", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused(family: str, scheduler: str, options: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        choose_objective(getattr(diffusers, scheduler)(**options), family_by_class(family), "m")


def test_timesteps_are_uniform_over_the_training_steps():
    objective = Diffusion(DDPMScheduler(num_train_timesteps=10).alphas_cumprod, "epsilon")
    generator = torch.Generator().manual_seed(0)
    t = objective.draw([generator] * 20_000)
    shares = torch.bincount(t, minlength=10) / len(t)
    assert len(shares) == 10
    assert float((shares - 0.1).abs().max()) < 0.01


def test_a_batch_is_noised_as_its_objective_says():
    table = DDPMScheduler().alphas_cumprod
    latents = torch.randn(64, 2, 2, 2)
    for prediction in ("epsilon", "v_prediction"):
        objective = Diffusion(table, prediction)  # type: ignore[arg-type]
        draws = SampleRandom(0, "stage2", 0, 0, 64)
        conditions = drop_conditions(["a"] * 64, "", 0.5, draws)
        batch = noise_batch(objective, latents, draws)
        alpha, sigma = objective.levels(batch.t)
        noise = (batch.x_t - alpha * latents) / sigma
        expected = noise if prediction == "epsilon" else alpha * noise - sigma * latents
        torch.testing.assert_close(batch.target, expected, rtol=1e-3, atol=1e-3)
        weight = error_weight(objective, batch.t, min_snr_gamma=5.0, x0_ratio_max=None)
        assert weight is not None
        assert torch.equal(weight, min_snr_weight(alpha, sigma, 5.0, prediction))  # type: ignore[arg-type]
        assert {"a", ""} == set(conditions)


@pytest.mark.parametrize("objective", [FLOW, Diffusion(DDPMScheduler().alphas_cumprod, "epsilon")])
def test_a_sample_is_noised_alike_in_any_part_of_the_batch(objective: Objective):
    latents = torch.randn(8, 2, 2, 2)
    captions = [str(number) for number in range(8)]
    draws = SampleRandom(0, "stage2", 3, 0, 8)
    conditions = drop_conditions(captions, "", 0.5, draws)
    whole = noise_batch(objective, latents, draws)
    for place in (0, 4):
        part = slice(place, place + 4)
        draws = SampleRandom(0, "stage2", 3, place, 4)
        kept = drop_conditions(captions[part], "", 0.5, draws)
        mine = noise_batch(objective, latents[part], draws)
        assert torch.equal(mine.x_t, whole.x_t[part])
        assert torch.equal(mine.t, whole.t[part])
        assert kept == conditions[part]
    assert len(whole.t.unique()) > 4


def test_flow_matching_takes_its_timesteps_from_the_recipe():
    settings = FlowOptim(max_steps=1, batch_size=1, timestep_mean=0.5, timestep_std=0.8, timestep_shift=3.0)
    objective = flow_matching(settings)
    assert objective == FlowMatching(0.5, 0.8, 3.0)
    generators = [torch.Generator().manual_seed(number) for number in range(4)]
    normal = torch.cat([torch.randn(1, generator=torch.Generator().manual_seed(number)) for number in range(4)])
    assert torch.equal(objective.draw(generators), logit_normal(normal, mean=0.5, std=0.8, shift=3.0))
    assert choose_objective(None, family_by_class("LightningDiT"), "m", objective) is objective


def test_timesteps_of_flow_matching_are_refused_for_ddpm():
    objective = Diffusion(DDPMScheduler().alphas_cumprod, "epsilon")
    settings = Stage2(max_steps=1, batch_size=1, timestep_shift=3.0)
    check_timesteps(settings, FLOW)
    with pytest.raises(RecipeError, match=r"stage2.timestep_shift: belongs to flow matching"):
        check_timesteps(settings, objective)


def test_the_variance_half_of_a_head_gets_no_gradient():
    base = CASES["DiTTransformer2DModel"].build("DiTTransformer2DModel")
    wide = expand_transformer(base, 8)
    x = torch.randn(2, 12, 4, 4)
    parts = (torch.tensor([1, 2]),)
    prediction = family_by_class("DiTTransformer2DModel").call.predict(
        wide, wide.config, x, torch.tensor([10, 500]), parts
    )
    velocity_loss(prediction, torch.randn_like(x), LatentLayout(4, 8), 1.0).total.backward()
    gradient = wide.proj_out_2.weight.grad.unflatten(0, (4, 2, 12))  # (p*p, mean and variance, c, width)
    assert float(gradient[:, 0].abs().min()) > 0
    assert not gradient[:, 1].any()
    mask = new_weight_masks(wide)["proj_out_2.weight"].unflatten(0, (4, 2, 12))
    assert bool(mask[:, :, 4:].all())  # both halves have their new rows


def test_a_run_tells_what_it_cannot_train_before_it_reads_weights(tmp_path: Path, picture_folder: Path):
    stable_diffusion(tmp_path / "base")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    assert load_scheduler(str(tmp_path / "base")).config.prediction_type == "epsilon"
    values = tiny_upgrade_recipe(tmp_path / "base", picture_folder, stage2__timestep_shift=3.0)
    with pytest.raises(RecipeError, match="timestep_shift"):
        Upgrade(validate(values, "x"), tmp_path / "run", lambda progress: None)  # type: ignore[arg-type]
    config.write_text(text.replace('"epsilon"', '"sample"'))
    values = tiny_upgrade_recipe(tmp_path / "base", picture_folder, stage2__min_snr_gamma=5.0)
    with pytest.raises(ModelError, match="prediction_type 'sample', which davae cannot train"):
        Upgrade(validate(values, "x"), tmp_path / "run", lambda progress: None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
def test_pictures_on_the_way_are_solved_by_the_bases_objective(prediction: Any):
    """A model that always knows the true latents leads back to them, guided or not."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=prediction == "v_prediction")
    table = scheduler.alphas_cumprod
    objective = FLOW if prediction == "flow" else Diffusion(table, prediction)
    if isinstance(objective, Diffusion):
        torch.testing.assert_close(ddim(objective).alphas_cumprod, table, rtol=1e-3, atol=1e-6)
    truth = torch.randn(2, 4, 3, 3)

    class Knowing:
        null = None

        def predict(self, model: Any, x: torch.Tensor, t: torch.Tensor, conditions: list[Any]) -> torch.Tensor:
            alpha, sigma = objective.levels(t)
            noise = (x - alpha * truth) / sigma
            return objective.target(truth, noise, t)

    task: Any = SimpleNamespace(objective=objective, modules={"transformer": None}, levels=None)
    for scale in (1.0, 4.0):
        found = solve(Knowing(), task, torch.randn(2, 4, 3, 3), ["a", "b"], 10, scale)
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)


def test_a_ddpm_model_is_validated_and_shown(tmp_path: Path, picture_folder: Path):
    stable_diffusion(tmp_path / "base")
    values = tiny_upgrade_recipe(
        *(tmp_path / "base", picture_folder), data__holdout=0.3, stage1__max_steps=1, stage2__max_steps=2,
        stage2__validate_every=1, run__sample_every=2,
    )  # fmt: skip
    Upgrade(validate(values, "x"), tmp_path / "run", lambda progress: None).run()  # type: ignore[arg-type]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "stage2"]
    assert all(0 < r["validation_loss"] < 100 for r in records)
    assert (tmp_path / "run" / "progress" / "stage2-00000002.png").is_file()


def test_a_tensor_goes_to_a_gpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch):
    """No GPU is here: its two calls are noted instead."""
    calls: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (calls.append("pin"), self)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to, **how: (calls.append((to, how)), self)[1])
    gpu = torch.device("cuda")
    for layout in (None, torch.channels_last):
        calls.clear()
        sent = send(torch.arange(96.0).view(2, 3, 4, 4), gpu, layout)
        assert sent.is_contiguous(memory_format=layout or torch.contiguous_format)
        assert calls == ["pin", ((gpu,), {"non_blocking": True})]
