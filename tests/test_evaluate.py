"""Metrics against closed forms and libraries; the report's parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from davae import LatentLayout
from davae.analyze.curves import loss_curves, smooth
from davae.data.pictures import to_images, to_tensor
from davae.evaluate.generation import GaussianFit, frechet_distance
from davae.evaluate.reconstruction import psnr, score_reconstructions
from davae.losses.perceptual import Lite0Distance, Lpips
from davae.sample.generate import base_noise, structured_noise
from davae.train.plan import plan, token_plan


def gaussian(samples: np.ndarray) -> GaussianFit:
    fit = GaussianFit(samples.shape[1])
    for part in np.array_split(samples, 3):
        fit.update(torch.from_numpy(part))
    return fit


def test_frechet_distance_of_commuting_gaussians_is_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 4))
    b = a * np.array([1.0, 2.0, 0.5, 3.0]) + np.array([0.0, 1.0, 0.0, -2.0])
    fit_a, fit_b = gaussian(a), gaussian(b)
    values, vectors = np.linalg.eigh(np.cov(a.T))
    whitened = (a - a.mean(0)) @ vectors / np.sqrt(values)  # covariance exactly 1: any other one commutes with it
    fit_w, fit_d = gaussian(whitened), gaussian(whitened * [1.0, 2.0, 3.0, 4.0] + 1.0)
    assert frechet_distance(fit_w, fit_d) == pytest.approx(4 + (0 + 1 + 4 + 9), rel=1e-9)
    assert frechet_distance(fit_a, fit_a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(fit_a, fit_b) == pytest.approx(frechet_distance(fit_b, fit_a), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(fit_a, GaussianFit(4))
    with pytest.raises(ValueError, match="not finite"):
        gaussian(np.full((3, 4), np.nan))


def test_psnr_equals_torchmetrics():
    a, b = torch.rand(2, 3, 3, 8, 8)
    expected = [float(peak_signal_noise_ratio(x, y, data_range=1.0)) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected))


def test_scores_do_not_depend_on_the_batch_size():
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    blur = lambda x: x.mean((-1, -2), keepdim=True).expand_as(x)  # noqa: E731
    one, five = (score_reconstructions(images.split(n), blur) for n in (1, 5))
    assert one.as_dict() == pytest.approx(five.as_dict(), rel=1e-4)
    assert score_reconstructions([images], lambda x: x).psnr == 100.0
    with pytest.raises(ValueError, match="no pictures"):
        score_reconstructions([], blur)


def test_lite0_distance_is_zero_for_equal_pictures_and_carries_a_gradient():
    distance = Lite0Distance()
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(distance(target, target).abs().max()) < 1e-10
    distance(images, target).sum().backward()
    assert float(images.grad.abs().max()) > 0
    assert not distance.train().training
    assert not any(p.requires_grad for p in distance.parameters())


def test_lpips_alex_from_a_weights_file(shared: Path):
    """The shared file gives LPIPS v0.1: zero for equal pictures, growing with blur."""
    distance = Lpips("alex", str(shared / "weights/lpips/alex.safetensors"))
    images = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16) * 2 - 1, (64, 64), mode="bicubic").clamp(-1, 1)
    blurred = [torch.nn.functional.avg_pool2d(images, k, 1, k // 2, count_include_pad=False) for k in (3, 9)]
    values = [float(distance(picture, images)) for picture in (images, *blurred)]
    assert values[0] == 0.0
    assert 0 < values[1] < values[2]
    with pytest.raises(ValueError, match="do not exist"):
        Lpips("alex", "/no/file.safetensors")
    with pytest.raises(ValueError, match=r"lack '.*' of LPIPS vgg"):
        Lpips("vgg", str(shared / "weights/lpips/alex.safetensors"))


def test_base_and_upgraded_share_their_base_noise():
    layout = LatentLayout(4, 8)
    noise = structured_noise(3, 5, layout, 6, 6)
    assert torch.equal(layout.split(noise)[0], base_noise(3, 5, 4, 6, 6))
    assert not torch.equal(layout.split(noise)[1][:, :4], base_noise(3, 5, 4, 6, 6))
    assert not torch.equal(base_noise(3, 5, 4, 6, 6), base_noise(3, 6, 4, 6, 6))


def test_pictures_round_trip_through_tensors():
    pixels = torch.randint(0, 256, (1, 3, 4, 4)).float()
    assert torch.equal(to_tensor(to_images(pixels / 127.5 - 1)[0]), pixels[0] / 127.5 - 1)


def test_curves_are_drawn_only_from_what_was_logged():
    records = [{"stage": "stage2", "step": n, "loss_base": 1.0, "loss_detail": 2.0} for n in range(5)]
    picture = loss_curves(records, "stage2")
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert loss_curves(records, "stage1") is None
    assert np.allclose(smooth(np.full(40, 3.0)), 3.0)
    assert len(smooth(np.arange(40.0))) == 40


def test_flops_of_sd35_medium_give_the_known_bound():
    """SD3.5-M at 1K: 4,096 native tokens against 1,024, a bound of about 4.6 at 333 text tokens."""
    from davae.models.pipeline import BaseShapes

    config = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    }
    shapes = BaseShapes("StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL", 16, 8, 2, config, {})
    tokens = token_plan(shapes, 1024, 2)
    assert (tokens.native_tokens, tokens.upgraded_tokens) == (4096, 1024)
    assert 4.3 < tokens.bound < 4.9


def test_plan_counts_what_training_will_train(tiny_base: Path, picture_folder: Path):
    from conftest import tiny_upgrade_recipe
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from davae import DetailVAE, expand_transformer
    from davae.recipes import validate
    from davae.train.stage2 import choose_trainable

    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder), "tiny")
    figures = plan(recipe)  # type: ignore[arg-type]
    vae = DetailVAE.from_base(AutoencoderKL.from_pretrained(tiny_base / "vae"), 8)
    wide = expand_transformer(SD3Transformer2DModel.from_pretrained(tiny_base / "transformer"), 8)
    trained = sum(p.numel() for p in choose_trainable(wide, recipe.stage2.lora))  # type: ignore[union-attr]
    assert figures["stage1_trainable_parameters"] == sum(p.numel() for p in vae.parameters() if p.requires_grad)
    assert figures["stage2_trainable_parameters"] == trained
    assert (figures["tokens_upgraded"], figures["tokens_native"]) == (16, 64)
