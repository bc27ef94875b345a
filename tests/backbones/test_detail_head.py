"""The detail head: linear Gaussian skip and x0 prediction against closed forms; casts, files, and other classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_transformer
from safetensors import safe_open
from test_lightning_dit import random_model
from torch import Tensor

from davae import LightningDiT, expand_transformer, velocity_loss
from davae.backbones.detail_head import SMALLEST_LEVEL, DetailHead, x0_level
from davae.backbones.head_options import HeadOptions, attach_head, set_skip_moments, upgrade_tensors
from davae.backbones.linear_gaussian import (
    SMALLEST_VARIANCE,
    LinearGaussian,
    expected_velocity,
    expected_velocity_by_channel,
    expected_velocity_error,
    velocity_gain,
)
from davae.backbones.trainable import choose_trainable
from davae.cost.flops import transformer_flops
from davae.data.latent_cache.moments import latent_moments
from davae.errors import ModelError
from davae.latent import LatentLayout, LatentStatistics
from davae.losses.flow_matching import interpolate, velocity_target
from davae.publish.assemble import FORMAT, apply_upgrade, check_fit, read_details, save_upgrade
from davae.recipes.sections import Lora

LAYOUT = LatentLayout(4, 8)
SKIP, X0, BOTH = HeadOptions(True), HeadOptions(False, "x0"), HeadOptions(True, "x0")


def moments(channels: int = 12) -> tuple[Tensor, Tensor]:
    """A mean, and a covariance in which base and detail depend on each other."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    mean = 0.3 * torch.randn(channels, generator=generator, dtype=torch.float64)
    return mean, mixing @ mixing.T + 0.05 * torch.eye(channels, dtype=torch.float64)


def draw(count: int) -> Tensor:
    """Latents (count,12,8,8) of these moments."""
    mean, covariance = moments()
    normal = torch.randn(count, 8, 8, 12, dtype=torch.float64)
    return (normal @ torch.linalg.cholesky(covariance).T + mean).permute(0, 3, 1, 2)


def upgraded(options: HeadOptions, dtype: torch.dtype = torch.float32, **changes: object) -> LightningDiT:
    """An expanded model with this head, as stage 2 starts it."""
    model = expand_transformer(random_model(torch.float32, **changes), 8)
    attach_head(model, options)
    if options.linear_skip:
        set_skip_moments(model, *moments())
    return model.to(dtype)


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.5, 1.0])
def test_the_closed_form_is_the_conditional_expectation(sigma: float):
    """Brute force: the joint covariance of (v, x_t), and its Schur complement."""
    mean, S = moments()
    eye, alpha = torch.eye(12, dtype=torch.float64), 1 - sigma
    x_t = torch.randn(5, 12, 3, 2, dtype=torch.float64)
    cross, own = sigma * eye - alpha * S, alpha**2 * S + sigma**2 * eye  # E[v y^T], E[y y^T]
    centred = x_t.movedim(1, -1) - alpha * mean
    expected = (centred @ torch.linalg.solve(own, cross.T)).movedim(-1, 1) - mean.view(-1, 1, 1)
    values, directions = torch.linalg.eigh(S)
    found = expected_velocity(x_t, torch.full((5,), sigma, dtype=torch.float64), mean, directions, values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # the form of E[x | x_t] in the docstring
    x = mean.view(-1, 1, 1) + (centred @ torch.linalg.solve(own, alpha * S)).movedim(-1, 1)
    torch.testing.assert_close(x_t - sigma * found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [(0.3, 0.7), (0.0, 0.5), (1.0, 1.0), (0.0, 0.05)])
def test_two_levels_have_the_conditional_expectation_of_their_own(levels: tuple[float, float]):
    """Brute force: the linear regression of v = n - x on A x + diag(s) n, from the joint covariance of (x, n)."""
    mean, S = moments()
    s = torch.tensor([levels[0]] * 4 + [levels[1]] * 8, dtype=torch.float64)
    A, N = (1 - s).diag(), s.diag()
    x_t = torch.randn(3, 12, 2, 2, dtype=torch.float64)
    joint = torch.block_diag(S, torch.eye(12, dtype=torch.float64))  # of (x, n)
    observe, wanted = torch.cat([A, N], 1), torch.cat([-torch.eye(12).double(), torch.eye(12).double()], 1)
    regression = wanted @ joint @ observe.T @ torch.linalg.inv(observe @ joint @ observe.T)
    expected = ((x_t.movedim(1, -1) - A @ mean) @ regression.T - mean).movedim(-1, 1)
    values, directions = torch.linalg.eigh(S)
    found = expected_velocity_by_channel(x_t, s.expand(3, -1), mean, directions, values)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    if levels[0] == levels[1]:
        same = expected_velocity(x_t, s[:1].expand(3), mean, directions, values)
        torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-10)


def test_the_gain_matches_regression_on_samples():
    """No covariance formula: least squares on drawn pairs (y, v)."""
    x, n = 0.7 * torch.randn(400_000, dtype=torch.float64), torch.randn(400_000, dtype=torch.float64)
    y, v = 0.6 * x + 0.4 * n, n - x
    gain = velocity_gain(torch.tensor([0.49]), torch.tensor([[0.4]]))
    assert float(gain) == pytest.approx(float(y @ v / (y @ y)), abs=0.01)


def test_levels_differ_by_sample_and_are_bounded():
    gain = velocity_gain(torch.tensor([SMALLEST_VARIANCE]), torch.linspace(0, 1, 10_001).view(-1, 1))
    assert float(gain.abs().max()) < 1.01 / (2 * SMALLEST_VARIANCE**0.5)
    x_t = torch.randn(2, 12, 2, 2).double()
    skip = LinearGaussian(12)
    skip.set_moments(*moments())
    both = skip(x_t, torch.tensor([0.2, 0.9]).double())
    for index, sigma in enumerate((0.2, 0.9)):
        alone = skip(x_t[index : index + 1], torch.tensor([sigma]).double())
        torch.testing.assert_close(both[index : index + 1], alone)


def test_moments_of_a_cache_are_those_of_its_normalised_latents():
    raw = torch.randn(7, 12, 2, 3).numpy() * 3 + 1
    wide = torch.randn(1, 12, 4, 1).numpy()  # another bucket

    class Cache:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, item: tuple[int, int]):
            return (wide[0] if item[0] == 7 else raw[item[0]]), 0

    statistics = LatentStatistics(torch.full((1, 12, 1, 1), 1.0), torch.full((1, 12, 1, 1), 3.0))
    mean, covariance = latent_moments(Cache(), statistics)  # type: ignore[arg-type]
    positions = torch.cat([torch.tensor(part).double().transpose(0, 1).flatten(1) for part in (raw, wide)], 1)
    positions = (positions - 1) / 3
    torch.testing.assert_close(mean, positions.mean(1))
    torch.testing.assert_close(covariance, torch.cov(positions, correction=0))


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SKIP, X0, BOTH])
@pytest.mark.parametrize("changes", [{}, {"patch_size": 2, "learn_sigma": True}, {"reversed_time": True}])
def test_step_0_keeps_the_base_to_the_bit_and_starts_at_the_closed_form(options: HeadOptions, changes: dict):
    base = random_model(torch.float32, **changes)
    model = expand_transformer(base, 8)
    attach_head(model, options)
    if options.linear_skip:
        set_skip_moments(model, *moments())
    x, t, label = torch.randn(3, 12, 8, 8), torch.tensor([0.0, 0.4, 0.99]), torch.tensor([0, 1, 5])
    with torch.no_grad():
        z, z_d = LAYOUT.split(model(x, t, label).sample)
        plain, zero = LAYOUT.split(expand_transformer(base, 8)(x, t, label).sample)
    assert torch.equal(z, plain)
    assert not zero.any()
    if options.linear_skip:
        mean, S = moments()
        values, directions = torch.linalg.eigh(S)
        v = expected_velocity(x.double(), 1 - t.double(), mean, directions, values)
        expected = -LAYOUT.split(v)[1]
    else:  # the velocity data - noise of x_0 = 0
        expected = -LAYOUT.split(x.double())[1] / (1 - t.double()).clamp(min=SMALLEST_LEVEL).view(3, 1, 1, 1)
    torch.testing.assert_close(z_d.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [SKIP, BOTH])
def test_an_untrained_upgrade_has_the_loss_of_the_linear_optimum(options: HeadOptions):
    """That of the best linear prediction is the diagonal of the covariance of v given x_t, U diag(l/(a^2 l + s^2)) U^T."""
    model, latents = upgraded(options), draw(256)
    _, S = moments()
    values, directions = torch.linalg.eigh(S)
    for sigma in (0.15, 0.5, 0.9):
        noise, t = torch.randn_like(latents), torch.full((256,), sigma)
        x_t = interpolate(latents, noise, t).float()
        with torch.no_grad():
            prediction = -model(x_t, 1 - t, torch.zeros(256, dtype=torch.long)).sample
        loss = velocity_loss(prediction, velocity_target(latents, noise).float(), LAYOUT, 1.0).detail
        left = values / ((1 - sigma) ** 2 * values + sigma**2)
        optimum = float((directions[4:] ** 2 * left).sum(1).mean())
        assert float(loss) == pytest.approx(optimum, rel=0.02)  # 16,384 positions
        assert optimum < float(LAYOUT.split(velocity_target(latents, noise))[1].square().mean())


@pytest.mark.parametrize("base_level", [0.0, 0.3])
def test_at_two_levels_an_untrained_upgrade_has_the_loss_of_their_optimum(base_level: float):
    """A clean base is the Schur complement: what z leaves of z_d, and then the noise of z_d alone."""
    model = expand_transformer(random_model(torch.float32), 8, detail_offset=0.2)
    attach_head(model, BOTH)
    set_skip_moments(model, *moments())
    latents, levels = draw(256), torch.tensor([base_level, 0.5]).expand(256, 2)
    noise = torch.randn_like(latents)
    groups = zip(LAYOUT.split(latents), LAYOUT.split(noise), levels.unbind(1), strict=True)
    x_t = LAYOUT.join(*(interpolate(*group) for group in groups)).float()
    with torch.no_grad():
        prediction = -model(x_t, 1 - levels, torch.zeros(256, dtype=torch.long)).sample
    loss = velocity_loss(prediction, velocity_target(latents, noise).float(), LAYOUT, 1.0).detail
    _, S = moments()
    b, d = slice(0, 4), slice(4, 12)
    seen = (1 - base_level) ** 2 * S[b, b] + base_level**2 * torch.eye(4).double()
    left = S[d, d] - (1 - base_level) ** 2 * S[d, b] @ torch.linalg.solve(
        seen, S[b, d]
    )  # of z_d given the base's state
    optimum = float((left @ torch.linalg.inv(0.25 * (left + torch.eye(8).double()))).trace()) / 8
    assert float(loss) == pytest.approx(optimum, rel=0.02)


def test_x0_prediction_is_the_velocity_of_what_the_rows_are():
    head = DetailHead(12, 4, prediction="x0").double()
    x, noise, t = (
        torch.randn(4, 12, 2, 2).double(),
        torch.randn(4, 12, 2, 2).double(),
        torch.tensor([0.0, 0.3, 0.94, 0.99]),
    )
    x_t = interpolate(x, noise, 1 - t.double())
    found = head(x, x_t, t)  # the rows hold x_0
    torch.testing.assert_close(LAYOUT.split(found)[1][:3], LAYOUT.split(x - noise)[1][:3])
    level = x0_level(1 - t.double()).view(4, 1, 1, 1)
    torch.testing.assert_close(level.flatten(), torch.tensor([1, 0.7, 0.06, 0.05]).double(), rtol=1e-6, atol=0)
    reached = x_t + level * (x - noise)  # below the level: the state on the path that has 0.05 less noise
    torch.testing.assert_close(LAYOUT.split(head(reached, x_t, t))[1], LAYOUT.split(x - noise)[1])
    assert torch.equal(LAYOUT.split(found)[0], LAYOUT.split(x)[0])


def test_both_options_predict_what_is_left_of_x0():
    """h = y - m L is the skip's x_0, to which the rows add."""
    both, skip, x0 = (upgraded(options).detail_head for options in (BOTH, SKIP, X0))
    x_t, t, rows = torch.randn(2, 12, 2, 2), torch.tensor([0.2, 0.98]), torch.randn(2, 12, 2, 2)
    level = x0_level(1 - t).view(2, 1, 1, 1)
    linear = skip(torch.zeros_like(rows), x_t, t)  # -L
    torch.testing.assert_close(both(rows, x_t, t)[:, 4:], x0(rows + x_t + level * linear, x_t, t)[:, 4:])


def test_casts_keep_the_moments(tmp_path: Path):
    model = upgraded(SKIP)
    exact = {name: buffer.clone() for name, buffer in model.detail_head.named_buffers()}
    model.save_pretrained(tmp_path / "whole")
    model.half().save_pretrained(tmp_path / "half")
    for loaded in (
        model,
        model.bfloat16(),
        LightningDiT.from_pretrained(tmp_path / "half", torch_dtype=torch.float16),
        LightningDiT.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16),
    ):
        assert loaded.dtype.itemsize == 2
        assert exact.keys() == dict(loaded.detail_head.named_buffers()).keys()
        for name, buffer in loaded.detail_head.named_buffers():
            assert torch.equal(buffer, exact[name])
    with torch.no_grad():
        output = loaded(torch.randn(1, 12, 8, 8).bfloat16(), torch.tensor([0.5]), torch.tensor([0])).sample
    assert output.dtype == torch.bfloat16


def test_autocast_leaves_the_skip_in_float32_and_meta_counts_it():
    head, x_t, t, rows = upgraded(BOTH).detail_head, torch.randn(2, 12, 2, 2), torch.rand(2), torch.randn(2, 12, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(rows, x_t, t)
    assert torch.equal(found, head(rows, x_t, t))
    models = []
    for options in (X0, SKIP):
        config = dict(upgraded(options).config)
        config.pop("_use_default_values")  # as in a saved config
        with torch.device("meta"):
            models.append(LightningDiT.from_config(config))
    plain, skip = models
    assert transformer_flops(skip, 8).total - transformer_flops(plain, 8).total == 2 * 2 * 12 * 12 * 64


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
@pytest.mark.parametrize("options", [SKIP, X0, BOTH])
def test_an_upgrade_file_brings_the_head(tmp_path: Path, options: HeadOptions, lora: Lora | None):
    base, file = random_model(torch.float32), tmp_path / "upgrade.safetensors"
    trained = expand_transformer(base, 8)
    attach_head(trained, options)
    if options.linear_skip:
        set_skip_moments(trained, *moments())
    choose_trainable(trained, lora)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_upgrade(trained, file, lora, torch.float32)
    check_fit(file, type(base).__name__, base.config)
    applied = apply_upgrade(base, file)
    assert applied.config["head_options"] == {"base_channels": 4, **options.values()}
    x, t, label = torch.randn(2, 12, 8, 8), torch.rand(2), torch.tensor([0, 5])
    with torch.no_grad():
        expected = trained(x, t, label).sample
        torch.testing.assert_close(applied(x, t, label).sample, expected, rtol=1e-4, atol=1e-4)
        applied.save_pretrained(tmp_path / "folder")
        again = LightningDiT.from_pretrained(tmp_path / "folder")
        assert torch.equal(again(x, t, label).sample, applied(x, t, label).sample)
    save_upgrade(trained, file, lora, torch.bfloat16)
    with safe_open(file, "pt") as stream:
        names = [name for name in stream.keys() if name.startswith("detail_head.")]  # noqa: SIM118
        assert len(names) == (3 if options.linear_skip else 0)
        assert all(stream.get_tensor(name).dtype == torch.float32 for name in names)
        assert set(stream.keys()) == upgrade_tensors(trained).keys()


def test_without_options_nothing_changes():
    model = expand_transformer(random_model(torch.float32), 8)
    names = set(model.state_dict())
    attach_head(model, HeadOptions())
    assert model.detail_head is None
    assert set(model.state_dict()) == names
    assert model.config["head_options"] is None


def test_other_classes_and_damaged_files_are_one_line(tmp_path: Path):
    with pytest.raises(
        ModelError, match=r"a SD3Transformer2DModel is a class of diffusers.*need davae's own LightningDiT"
    ):
        attach_head(expand_transformer(tiny_transformer(), 4), SKIP)
    with pytest.raises(ValueError, match="predicts epsilon has no detail_head"):
        attach_head(expand_transformer(random_model(torch.float32, prediction_type="epsilon"), 8), X0)
    with pytest.raises(ValueError, match="predicts epsilon has no detail_head"):
        LightningDiT(in_channels=12, prediction_type="epsilon", head_options={"base_channels": 4})
    with pytest.raises(ValueError, match="the detail's prediction is 'noise'; use velocity or x0"):
        DetailHead(12, 4, prediction="noise")  # type: ignore[arg-type]
    plain = {"format": FORMAT, "class": "LightningDiT", "channels": "[4, 12]", "lora": "null"}
    for wrong in ({"skip": True}, [1], {"linear_skip": 1}, {"prediction": "noise"}):
        with pytest.raises(ModelError, match=r"upgrade file x: detail_head is .*; it is damaged"):
            read_details(Path("x"), {**plain, "detail_head": json.dumps(wrong)})
    stock = {**plain, "class": "SD3Transformer2DModel", "detail_head": json.dumps(SKIP.values())}
    with pytest.raises(ModelError, match="is a class of diffusers"):
        read_details(Path("x"), stock)


def test_the_error_that_is_left_is_that_of_jointly_gaussian_variables():
    torch.manual_seed(0)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    covariance, one = mixing @ mixing.T, torch.eye(5, dtype=torch.float64)
    levels = torch.tensor([0.05, 0.4, 1.0], dtype=torch.float64)
    for s, found in zip(levels, expected_velocity_error(covariance, levels), strict=True):
        cross = s * one - (1 - s) * covariance  # E[v y^T]
        state = (1 - s) ** 2 * covariance + s**2 * one
        left = one + covariance - cross @ torch.linalg.inv(state) @ cross.T
        torch.testing.assert_close(found, left.diagonal(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(found, covariance.diagonal())  # all noise: v is known up to the data
