"""Metrics against closed forms and libraries; the report's parts."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import picture
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_training import run_cli
from torch_fidelity.metric_prc import prc_features_to_metric

import davae.evaluate.generation
from davae import LatentLayout
from davae.analyze.curves import loss_curves, smooth
from davae.backbones.families import family_by_class
from davae.data.images import to_images, to_tensor
from davae.errors import DataError, ModelError
from davae.evaluate.distribution import (
    Gaussian,
    distribution_scores,
    frechet_distance,
    gaussian_distance,
    stored_gaussian,
)
from davae.evaluate.features import Features, InceptionFeatures, Lite0Features, extract
from davae.evaluate.reconstruction import psnr, score_reconstructions, ssim
from davae.losses.perceptual import Lite0Distance, Lpips
from davae.plan.dry_run import plan
from davae.plan.figures import token_plan
from davae.sample.generate import base_noise, step_generator, structured_noise


def whitened(rows: int, seed: int) -> np.ndarray:
    """Samples whose mean is exactly 0 and covariance exactly 1."""
    x = np.random.default_rng(seed).normal(size=(rows, 4))
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    return x @ vectors / np.sqrt(values)


@pytest.mark.parametrize(("rows", "others"), [(2, 2), (7, 30), (39, 12)])
def test_frechet_distance_of_few_rows_is_that_of_their_gaussians(rows: int, others: int):
    a, b = torch.randn(rows, 40) * torch.linspace(0.1, 3, 40), 1 + torch.randn(others, 40)
    expected = gaussian_distance(Gaussian.of(a), Gaussian.of(b))
    assert frechet_distance(a, b) == pytest.approx(
        expected, rel=1e-6
    )  # square roots of rounding in the (40,40) matrices
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match="length 40 cannot be compared with features of length 39"):
        frechet_distance(a, b[:, :39])


def test_frechet_distance_of_gaussians_is_the_closed_form():
    one, other = whitened(500, 0), whitened(300, 1) * [1.0, 2.0, 3.0, 4.0] + 1.0
    a, b = torch.from_numpy(one), torch.from_numpy(other)
    assert frechet_distance(a, b) == pytest.approx(4 + (0 + 1 + 4 + 9), rel=1e-9)  # |mu|^2 + sum (sigma - 1)^2
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    stretched = torch.from_numpy(one * [3.0, 1.0, 0.5, 2.0] @ turn)
    cov_a, cov_b = np.cov(stretched.T.numpy()), np.cov(b.T.numpy())
    direct = np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real) + 4
    assert frechet_distance(stretched, b) == pytest.approx(direct, rel=1e-8)
    assert frechet_distance(stretched, b) == pytest.approx(frechet_distance(b, stretched), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(a, b[:1])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, torch.full((3, 4), torch.nan))


def test_fid_to_adm_s_reference_is_taken_to_its_stored_statistics(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Corner:
        """Stands for Inception, whose weights are not here."""

        name = "fid"

        def __call__(self, images: torch.Tensor) -> Features:
            return Features(images[:, :, 0, 0])

    monkeypatch.setattr(davae.evaluate.generation, "make_extractor", lambda name, weights: Corner())
    mean, covariance = np.array([0.1, 0.2, 0.3]), np.diag([1.0, 2.0, 3.0])
    pictures = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures, mu=mean, sigma=covariance)
    np.savez(tmp_path / "plain.npz", arr_0=pictures)
    np.savez(tmp_path / "odd.npz", arr_0=pictures, mu=mean, sigma=covariance[:2])
    options = {"resolution": 32, "num": None, "features": "inception", "feature_weights": None}
    found = davae.evaluate.generation.evaluate_pictures(str(picture_folder), f"{tmp_path}/reference.npz", **options)
    real = davae.evaluate.generation.real_pictures(str(picture_folder), 32, 0.0, "train")
    own = Gaussian.of(torch.stack([real[(i, -1)]["image"][:, 0, 0] for i in range(len(real))]))
    assert found["fid"] == pytest.approx(gaussian_distance(own, Gaussian(mean, covariance)))
    assert found["fid_reference"] == "mu and sigma stored in the data"
    smaller = {**options, "resolution": 16}
    with pytest.raises(
        DataError, match=r"--resolution 16: mu and sigma in \S+ belong to images of 32 x 32 pixels; give"
    ):
        davae.evaluate.generation.evaluate_pictures(str(picture_folder), f"{tmp_path}/reference.npz", **smaller)
    plain = davae.evaluate.generation.evaluate_pictures(str(picture_folder), f"{tmp_path}/plain.npz", **options)
    assert "fid_reference" not in plain
    assert plain["fid"] != found["fid"]
    assert plain["kid"] == found["kid"]
    with pytest.raises(ValueError, match=r"mu is \(3,\) and sigma \(2, 3\), expected \(F,\) and \(F,F\)"):
        stored_gaussian(tmp_path / "odd.npz")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"broken\.npz is not an \.npz that can be read"):
        stored_gaussian(tmp_path / "broken.npz")


def test_precision_and_recall_hold_rows_of_their_distances(monkeypatch: pytest.MonkeyPatch):
    one, other = torch.randn(1100, 3), torch.randn(1200, 3) + 0.5
    expected = prc_features_to_metric(one, other, verbose=False)
    cdist, held = torch.cdist, []
    monkeypatch.setattr(torch, "cdist", lambda a, b: held.append(len(a) * len(b)) or cdist(a, b))
    found = distribution_scores(Features(one), Features(other), subset=10, subsets=1)
    assert (found.precision, found.recall) == (expected["precision"], expected["recall"])
    assert max(held) <= 1000 * 1000


def test_set_distances_tell_near_from_far():
    real, same, far = (Features(torch.randn(60, 8) + shift) for shift in (0.0, 0.0, 4.0))
    near, away = (
        distribution_scores(same, real, subset=30, subsets=5),
        distribution_scores(far, real, subset=30, subsets=5),
    )
    assert near.frechet < away.frechet
    assert abs(near.kernel) < away.kernel
    assert near.precision > 0.8 > away.precision
    assert near.recall > 0.8 > away.recall
    assert distribution_scores(same, real).subset == 60
    assert near.inception is None
    sure = Features(torch.randn(600, 8), 20 * torch.nn.functional.one_hot(torch.arange(600) % 5).float())
    assert distribution_scores(sure, real).inception[0] == pytest.approx(5, rel=0.1)  # type: ignore[index]
    assert set(near.as_dict("fd_lite0")) >= {"fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0"}
    assert {"fid", "kid", "inception_score"} <= set(distribution_scores(sure, real).as_dict("fid"))
    with pytest.raises(ValueError, match="at least 4 images a side are needed, found 3 and 60"):
        distribution_scores(Features(torch.randn(3, 8)), real)


def small_lite0() -> Lite0Features:
    """On 64 instead of 224 pixels: a twelfth of the time."""
    network = Lite0Features()
    network.size = 64
    return network


def test_features_do_not_depend_on_the_batch_size():
    images, network = torch.rand(64, 3, 24, 24) * 2 - 1, small_lite0()
    found = [extract(images.split(size), network).features for size in (1, 7, 64)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="not finite"):
        extract([torch.full((1, 3, 24, 24), torch.nan)], network)
    with pytest.raises(ValueError, match="no images"):
        extract([], network)


def test_inception_from_a_file(tmp_path: Path):
    """Random weights under the published names; no file runs code."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).state_dict()
    torch.save(state, path)
    found = InceptionFeatures(path)(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert found.features.shape == (2, 2048)
    assert found.logits is not None
    with pytest.raises(ModelError, match=r"Inception weights .*none\.pth"):
        InceptionFeatures(tmp_path / "none.pth")
    torch.save({"x": print}, path)
    with pytest.raises(ModelError, match=r"Inception weights .*inception\.pth"):
        InceptionFeatures(path)


def photo_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random picture and the same with noise, uint8 steps, (1,3,48,64) in [0,1]."""
    small = torch.rand(1, 3, 6, 8)
    picture = torch.nn.functional.interpolate(small, (48, 64), mode="bicubic").clamp(0, 1)
    noisy = (picture + 0.1 * torch.randn_like(picture)).clamp(0, 1)
    return (picture * 255).round() / 255, (noisy * 255).round() / 255


def test_psnr_and_ssim_equal_scikit_image():
    a, b = photo_pair()
    x, y = (image[0].permute(1, 2, 0).double().numpy() for image in (a, b))
    assert float(psnr(a, b)) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), rel=1e-5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    assert float(ssim(a, b)) == pytest.approx(structural_similarity(x, y, channel_axis=2, **options), rel=1e-4)


def test_scores_do_not_depend_on_the_batch_size():
    images = torch.rand(64, 3, 24, 24) * 2 - 1
    blur = lambda x: (x + x.mean((-1, -2), keepdim=True)) / 2  # noqa: E731
    network = small_lite0()
    one, seven, all_ = (score_reconstructions(images.split(n), blur, extractor=network) for n in (1, 7, 64))
    for other in (seven, all_):
        assert one.as_dict() == pytest.approx(other.as_dict(), rel=1e-3, abs=1e-6)
    assert set(one.as_dict()) == {"psnr", "ssim", "lite0", "rfd_lite0", "pictures"}
    assert one.frechet["rfd_lite0"] > 0
    assert score_reconstructions([images[:2]], lambda x: x).psnr == 100.0
    with pytest.raises(ValueError, match="no images"):
        score_reconstructions([], blur)


def test_lpips_equals_the_published_formula(shared: Path):
    """On two fixed pairs, from the file's trunk and heads alone: unit-normalised features, squared, weighed, averaged."""
    weights = load_file(shared / "weights/lpips/alex.safetensors")
    package = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", "cpu", weights_only=True)
    assert all(torch.equal(package[name], weights[name]) for name in package), "the heads are the published ones"
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    layers = [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]

    def taps(x: torch.Tensor) -> list[torch.Tensor]:
        x, found = (x - shift) / scale, []
        for depth, (number, stride, padding) in enumerate(layers):
            if depth in (1, 2):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            kernel, bias = (weights[f"features.{number}.{part}"] for part in ("weight", "bias"))
            x = torch.nn.functional.conv2d(x, kernel, bias, stride=stride, padding=padding).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    distance = Lpips("alex", str(shared / "weights/lpips/alex.safetensors"))
    for _ in range(2):
        a, b = (image * 2 - 1 for image in photo_pair())
        heads = [weights[f"lin{n}.model.1.weight"] for n in range(5)]
        squares = [(x - y).square() for x, y in zip(taps(a), taps(b), strict=True)]
        expected = sum((square * head).sum(1).mean() for square, head in zip(squares, heads, strict=True))
        assert float(distance(a, b)) == pytest.approx(float(expected), rel=1e-4)


def test_measuring_sets_on_disk(shared: Path, picture_folder: Path, tmp_path: Path):
    """A folder and an ADM file of the same pictures are at distance 0; LPIPS and rFD through the command line."""
    from davae.data.images import fit_square
    from davae.data.sources import open_source

    source = open_source(str(picture_folder), 32)
    pictures = np.stack([np.asarray(fit_square(source.load(i)[0], 32)) for i in range(len(source))])
    np.savez(tmp_path / "stored.npz", arr_0=pictures, arr_1=np.arange(12))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures)
    for name in ("stored", "packed"):
        assert np.array_equal(np.asarray(open_source(f"{tmp_path}/{name}.npz", 32).load(3)[0]), pictures[3])
    assert open_source(f"{tmp_path}/stored.npz", 32).label(5) == 5
    run_cli("evaluate", "pictures", "--generated", f"{tmp_path}/stored.npz", "--data", str(picture_folder), "--resolution",
            "32", "--features", "lite0", "--set", "data.background=black", "--json", f"{tmp_path}/p.json")  # fmt: skip
    figures = json.loads((tmp_path / "p.json").read_text())
    assert (figures["data"], figures["options"]) == (str(picture_folder), {"background": "black"})
    assert figures["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert figures["precision_lite0"] == figures["recall_lite0"] == 1.0
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((3, 4)))
    with pytest.raises(DataError, match=r"arr_0 is \(3, 4\) float64, expected \(N,H,W,3\) uint8"):
        open_source(f"{tmp_path}/wrong.npz", 32)
    run_cli("evaluate", "reconstruction", "--vae", "micro", "--data", str(picture_folder), "--resolution", "32", "--lpips",
            "alex", "--lpips-weights", str(shared / "weights/lpips/alex.safetensors"), "--features", "lite0",
            "--json", f"{tmp_path}/r.json")  # fmt: skip
    assert {"psnr", "ssim", "lite0", "lpips_alex", "rfd_lite0"} <= set(json.loads((tmp_path / "r.json").read_text()))


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


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (3, 5), (2**40, 7), (-1, 0)])
def test_the_noise_that_a_scheduler_adds_is_not_the_starting_noise(seed: int, index: int):
    """torch's generator on the CPU keeps 32 bits of a seed: an offset above them is the same stream."""
    added = torch.randn(1, 8, 4, 4, generator=step_generator(seed, index))
    start = structured_noise(seed, index, LatentLayout(4, 4), 4, 4)
    for part in added.split(4, 1):
        for other in start.split(4, 1):
            assert abs(float(torch.corrcoef(torch.stack([part.flatten(), other.flatten()]))[0, 1])) < 0.5
    assert not torch.equal(added, torch.randn(1, 8, 4, 4, generator=step_generator(seed, index + 1)))
    assert torch.equal(added, torch.randn(1, 8, 4, 4, generator=step_generator(seed, index)))


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


SD35_MEDIUM = {
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
FLUX1_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


@pytest.mark.parametrize(
    ("config", "resolution", "low", "high"),
    [(SD35_MEDIUM, 1024, 4.4, 4.8), (SD35_MEDIUM, 2048, 7.5, 8.2), (FLUX1_DEV, 1024, 3.3, 3.7)],
)
def test_flops_of_known_models_give_the_known_bounds(config: dict, resolution: int, low: float, high: float):
    """SD3.5-M at 1K: 4,096 native tokens against 1,024, a bound of about 4.6 at 333 text tokens; 7.9 at 2K; FLUX.1 3.5."""
    from davae.pretrained.shapes import BaseShapes, patch_size

    name = config["_class_name"]
    family = family_by_class(name)
    shapes = BaseShapes(family.pipeline, name, "AutoencoderKL", 16, 8, patch_size(config, family), config, {})
    tokens = token_plan(shapes, resolution, 2)
    assert (tokens.native_tokens, tokens.upgraded_tokens) == ((resolution // 16) ** 2, (resolution // 32) ** 2)
    assert low < tokens.bound < high


def test_plan_counts_what_training_will_train(tiny_base: Path, picture_folder: Path):
    from conftest import tiny_upgrade_recipe
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from davae import DetailVAE, expand_transformer
    from davae.backbones.trainable import choose_trainable
    from davae.recipes import validate

    recipe = validate(tiny_upgrade_recipe(tiny_base, picture_folder), "tiny")
    figures = plan(recipe).figures  # type: ignore[arg-type]
    vae = DetailVAE.from_base(AutoencoderKL.from_pretrained(tiny_base / "vae"), 8)
    wide = expand_transformer(SD3Transformer2DModel.from_pretrained(tiny_base / "transformer"), 8)
    trained = sum(p.numel() for p in choose_trainable(wide, recipe.stage2.lora))  # type: ignore[union-attr]
    assert figures["stage1_trainable_parameters"] == sum(p.numel() for p in vae.parameters() if p.requires_grad)
    assert figures["stage2_trainable_parameters"] == trained
    assert (figures["tokens_upgraded"], figures["tokens_native"]) == (16, 64)


def test_a_damaged_picture_is_left_out_not_its_neighbour_measured_twice(tmp_path: Path):
    for number in range(4):
        picture(number, 32, 32).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    pictures = davae.evaluate.generation.real_pictures(str(tmp_path), 32, 0.0, "train")
    found = torch.cat(list(davae.evaluate.generation.batches(pictures, size=2)))
    assert len(found) == 3
    assert len({tuple(image.flatten().tolist()) for image in found}) == 3
    assert list(pictures.skipped) == ["2.png"]


def test_prompts_of_samples_are_read_without_decoding_an_image(picture_folder: Path, tmp_path: Path, monkeypatch):
    """Thousands of prompts of a large set must not cost thousands of decodings."""
    module = davae.evaluate.generation
    monkeypatch.setattr(module, "goes_by_class", lambda pipeline: pipeline == "by class")
    images = module.real_pictures(str(picture_folder), 32, 0.0, "train")
    expected = [images[(place, -1)]["caption"] for place in range(len(images))]
    assert any(expected)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(0, 32, 32).save(tmp_path / name / "0.png")
    classes = module.real_pictures(str(tmp_path), 32, 0.0, "train")
    monkeypatch.setattr(type(images.source), "load", lambda *_: pytest.fail("decoded"))
    assert [module.condition_of(images, place, "by caption") for place in range(len(images))] == expected
    assert [module.condition_of(classes, place, "by class") for place in (0, 1)] == ["0", "1"]
    with pytest.raises(DataError, match="needs a class for every image"):
        module.condition_of(images, 0, "by class")


def test_a_disk_that_fails_once_costs_one_draw_and_no_image(picture_folder: Path, monkeypatch, caplog):
    images = davae.evaluate.generation.real_pictures(str(picture_folder), 32, 0.0, "train")
    read, first = type(images.source).load, []

    def failing(source, index, rng=None):
        if not first:
            first.append(index)
            raise OSError(errno.EIO, "Input/output error")
        return read(source, index, rng)

    monkeypatch.setattr(type(images.source), "load", failing)
    assert images[(0, -1)]["index"] == images.indices[1]
    assert "another image takes its place" in caplog.text
    assert not images.skipped
    assert images[(0, -1)]["index"] == images.indices[0]
