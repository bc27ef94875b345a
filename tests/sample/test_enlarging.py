"""Enlarging: known base, windows, calls in lockstep, every family's pipeline."""

from __future__ import annotations

import io
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import picture, tiny_autoencoder
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from torch import Tensor
from upgraded_tiny import BUILDERS, VARIANTS, assembled, upgraded

import davae
from davae.backbones.detail_time import OFFSET
from davae.backbones.expand import CLEAN_BASE
from davae.backbones.families import family_of
from davae.backbones.lightning_dit import LightningDiT
from davae.data.decoding import decode_image
from davae.data.images import to_tensor
from davae.errors import ModelError
from davae.evaluate.sample_file import class_schedule
from davae.latent import LatentLayout, LatentStatistics
from davae.pretrained.shapes import pixel_factor, token_side
from davae.sample.canvas import Canvas, WindowGrid
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.sample.draw_detail import draw_detail
from davae.sample.generate import generate, structured_noise
from davae.sample.levels import level_after
from davae.sample.lockstep import Left, together
from davae.sample.open import SamplingOptions
from davae.sample.upscale import back_projected, back_projected_detail, check_size
from davae.vae.blocks import downsample

FAST = ("Flux2Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SDXL")


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path):
    return assembled(tiny_base)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def differ(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (22, 14), (31, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_cover_and_blend_back(size: tuple[int, int], overlap: float):
    grid = WindowGrid.over(*size, 8, overlap)
    canvas = torch.randn(1, 3, *size, dtype=torch.float64)
    parts = grid.gather(canvas)
    assert parts.shape == (len(grid), 3, 8, 8)
    torch.testing.assert_close(grid.blend(parts), canvas)
    assert all(b - a <= 8 * (1 - overlap) + 1 for a, b in zip(grid.tops, grid.tops[1:], strict=False))


def test_a_window_fades_out_towards_its_edge():
    grid = WindowGrid.over(8, 12, 8, 0.5)
    assert grid.lefts == (0, 4)
    parts = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    row = grid.blend(parts)[0, 0, 4]
    assert row[:4].abs().max() == 0
    assert row[8:].min() == 1
    assert bool((row[4:8].diff() > 0).all())
    assert float(row.diff().max()) < 0.4


# -- lockstep --------------------------------------------------------------------------------------------------------


def test_calls_meet_at_every_step_and_end_in_reverse_order():
    events: list[str] = []

    def call(name: str):
        def run(exchange):
            events.append(f"in {name}")
            try:
                answers = [exchange(f"{name}{step}") for step in range(3)]
                assert answers == [f"{name}{step}!" for step in range(3)]
                raise Left
            finally:
                events.append(f"out {name}")

        return run

    met: list[list[str]] = []

    def meet(given: list[str]) -> list[str]:
        met.append(given)
        return [f"{one}!" for one in given]

    together([call("a"), call("b"), call("c")], meet)
    assert met == [[f"{name}{step}" for name in "abc"] for step in range(3)]
    assert events == ["in a", "in b", "in c", "out c", "out b", "out a"]
    together([call("d")], meet)
    assert met[-1] == ["d2"]


def test_a_call_that_fails_ends_all_and_leaves_no_thread():
    before = threading.active_count()

    def fine(exchange):
        exchange(0)
        exchange(1)

    def failing(exchange):
        exchange(0)
        raise ModelError("it broke")

    with pytest.raises(ModelError, match="it broke"):
        together([fine, failing, fine], lambda given: given)
    with pytest.raises(RuntimeError, match="different numbers of steps"):
        together([fine, lambda exchange: exchange(0)], lambda given: given)
    assert threading.active_count() == before


# -- enlarging -------------------------------------------------------------------------------------------------------


def test_the_base_stays_exactly_the_input_s_and_the_result_gives_it_back(pipeline, monkeypatch: pytest.MonkeyPatch):
    kept = []
    draw = draw_detail
    monkeypatch.setattr("davae.sample.upscale.draw_detail", lambda *a, **k: kept.append(draw(*a, **k)) or kept[-1])
    image = picture(1, 16, 16)
    (result,) = davae.upscale(pipeline, image, "a red square", steps=3)
    z = pipeline.vae.encode_base(to_tensor(image)[None])
    torch.testing.assert_close(pipeline.vae.layout.split(kept[0][0])[0], z)
    assert result.size == (32, 32)
    small = downsample(to_tensor(result)[None], 2)
    assert 10 * torch.log10(4 / (small - to_tensor(image)).square().mean()) > 35
    (free,) = davae.upscale(pipeline, image, "a red square", steps=3, faithful=False)
    assert differ(free, result) > 0


def test_a_free_base_of_strength_one_is_plain_drawing(pipeline, monkeypatch: pytest.MonkeyPatch):
    """With nothing clamped the detour over canvas and hooks is the stock pipeline's own drawing from the same noise."""
    kept = []
    draw = draw_detail
    monkeypatch.setattr(
        "davae.sample.upscale.draw_detail", lambda p, work, **k: kept.extend([work, draw(p, work, **k)]) or kept[1]
    )
    davae.upscale(pipeline, picture(1, 16, 16), "a", steps=3, strength=1.0, guidance_scale=3.0)
    work, (drawn,) = kept
    plain = pipeline(
        "a", latents=work[0].noise, height=32, width=32, num_inference_steps=3, guidance_scale=3.0,
        output_type="latent", max_sequence_length=1,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, plain, atol=1e-5, rtol=1e-4)


def test_strength_frees_the_last_steps_only(pipeline):
    results = [
        davae.upscale(pipeline, picture(3, 16, 16), steps=4, strength=s, faithful=False)[0] for s in (0, 0.2, 0.6)
    ]
    assert differ(results[0], results[1]) == 0  # not one step of four is a fifth
    assert differ(results[0], results[2]) > 0
    faithful, tiny = (davae.upscale(pipeline, picture(3, 16, 16), steps=4, strength=s)[0] for s in (0, 0.2))
    assert differ(faithful, tiny) == 0, "no step is free, so the result is brought back to its input"


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize(("strength", "kept"), [(1.0, 0), (0.5, 3), (0.0, 6)])
def test_strength_is_a_share_of_the_steps_of_schedulers_that_count_two(
    tmp_path_factory, kind, strength: float, kept: int
):
    pipeline = upgraded("UNet2DConditionModel", tmp_path_factory.mktemp("unet"))
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    clean = []
    image = picture(2, 16, 16)
    z = pipeline.vae.encode_base(to_tensor(image)[None])
    options = {"steps": 6, "guidance_scale": 1.0, "strength": strength, "faithful": False}
    davae.upscale(pipeline, image, **options, on_base=lambda step, bases: clean.append(torch.allclose(bases[0], z)))
    calls = len(clean)
    assert calls == (11 if kind is HeunDiscreteScheduler else 6)
    # at strength 1 the first estimate comes from the start, whose base is the input's noise alone
    known = sum(clean) * 6 / calls
    assert abs(known - kept) <= 1, clean
    assert clean == sorted(clean, reverse=True)


def test_results_do_not_depend_on_the_batch_its_order_or_the_chunks(pipeline):
    images = [picture(1, 16, 16), picture(2, 23, 31), picture(3, 9, 5)]
    one = davae.upscale(pipeline, images, steps=2, batch_size=1)
    many = davae.upscale(pipeline, images[::-1], steps=2, batch_size=16)[::-1]
    assert [image.size for image in one] == [(32, 32), (46, 62), (18, 10)]
    assert all(differ(a, b) <= 1 for a, b in zip(one, many, strict=True))
    assert differ(davae.upscale(pipeline, images[0], steps=2, seed=1)[0], one[0]) > 1


def test_prompts_reach_their_images(pipeline):
    images = [picture(1, 16, 16)] * 2
    one, two = davae.upscale(pipeline, images, ["a red square", "a blue disc"], steps=2, faithful=False)
    (alone,) = davae.upscale(pipeline, images[0], "a blue disc", steps=2, faithful=False)
    assert differ(two, alone) <= 1 < differ(one, two)


def stored(image: Image.Image, kind: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def awkward_images() -> dict[str, Image.Image]:
    """Return opened files whose stored numbers are not the picture."""
    exif, small = Image.Exif(), picture(1, 16, 12)
    exif[0x0112] = 6
    clear = small.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(small.size))
    deep = Image.fromarray((np.asarray(small.convert("L")).astype(np.uint16)) * 257)
    return {
        "turned": stored(small, "PNG", exif=exif),
        "transparent": stored(clear, "PNG"),
        "palette": stored(small.quantize(8), "PNG", transparency=0),
        "16 bits": stored(deep, "PNG"),
        "16 bits, TIFF": stored(deep, "TIFF"),
        "CMYK": stored(small.convert("CMYK"), "TIFF"),
    }


@pytest.mark.parametrize("name", awkward_images())
def test_an_opened_file_is_enlarged_as_it_looks_and_left_as_it_is(name: str, pipeline):
    """`davae.upscale` takes what `Image.open` returns, by the rules by which the command reads files."""
    image = awkward_images()[name]
    before = image.mode, image.size, image.tobytes()
    (result,) = davae.upscale(pipeline, image, steps=1)
    assert (image.mode, image.size, image.tobytes()) == before
    looks = decode_image(awkward_images()[name].fp)
    assert result.size == (2 * looks.width, 2 * looks.height)
    assert differ(result, davae.upscale(pipeline, looks, steps=1)[0]) == 0
    shrunk = np.asarray(result.resize(looks.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - pixels(looks)).mean() < 12  # a result at strength 0 looks like its input


def test_an_animation_is_one_line(pipeline):
    frames = [picture(number, 16, 16) for number in (1, 2)]
    moving = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ModelError, match="image 1: animation: 2 frames"):
        davae.upscale(pipeline, [frames[0], moving], steps=1)


def test_the_noise_of_a_second_time_depends_on_the_input_alone(pipeline, monkeypatch: pytest.MonkeyPatch):
    """A first result that another batch size rounds otherwise must not draw from other noise."""
    numbers: list[int] = []
    drawn = structured_noise
    monkeypatch.setattr(
        "davae.sample.upscale.structured_noise",
        lambda seed, number, *rest: numbers.append(number) or drawn(seed, number, *rest),
    )
    image = picture(1, 16, 16)
    davae.upscale(pipeline, image, steps=1, times=2)
    davae.upscale(pipeline, image, "a red square", steps=2, times=2)  # another first result
    number = zlib.crc32(image.tobytes())
    assert numbers == [number, number + 1] * 2


def test_large_seeds_are_not_small_ones():
    layout = LatentLayout(2, 4)
    numbers = (0, 1, -1, 2**31, 2**32, 2**70, -(2**70), 2**31 - 1)
    found = [structured_noise(seed, 0, layout, 2, 2) for seed in numbers]
    assert not any(torch.equal(a, b) for n, a in enumerate(found) for b in found[:n])


@pytest.mark.parametrize("seed", [-3, 2**62 - 1, 10**30])
def test_any_seed_draws(seed: int, pipeline):
    image = picture(1, 16, 16)
    one, other = (davae.upscale(pipeline, image, steps=1, seed=number)[0] for number in (seed, seed - 1))
    assert differ(one, other) > 0
    assert structured_noise(seed, 0, pipeline.vae.layout, 2, 2).isfinite().all()
    assert len(class_schedule(4, 3, "random", seed)) == 4
    if seed < 2**63:
        (again,) = davae.upscale(pipeline, image, steps=1, seed=np.int64(seed))
        assert differ(one, again) == 0


def test_a_long_strip_is_refused_by_the_pixels_that_it_is_drawn_on(pipeline):
    with pytest.raises(
        ModelError, match=r"strip: 4x3000000 pixels would become 8x6000000, drawn on 32x6000000, more"
    ):
        check_size(pipeline, (4, 3_000_000), 1, "strip")
    check_size(pipeline, (4, 30_000), 1, "strip")
    with pytest.raises(ModelError, match="nothing: 0x5 pixels"):
        check_size(pipeline, (0, 5), 1, "nothing")


def test_twice_is_four_times_as_large(pipeline):
    steps = []
    (twice,) = davae.upscale(
        pipeline, picture(1, 16, 12), steps=2, times=2, on_step=lambda done, total: steps.append((done, total))
    )
    assert twice.size == (64, 48)
    assert steps[-1] == (4, 4)
    assert steps == sorted(steps)


def test_the_pipeline_is_left_as_it_was(pipeline):
    scheduler, tiling = pipeline.scheduler, pipeline.vae.use_tiling
    davae.upscale(pipeline, picture(1, 24, 16), steps=2, batch_size=1)
    assert pipeline.scheduler is scheduler
    assert not {"step", "scale_model_input"} & set(vars(scheduler))
    assert pipeline.vae.use_tiling == tiling
    assert "decode" not in vars(pipeline.vae)


def test_a_compiled_transformer_draws_enlarges_and_shows_its_base(pipeline):
    model, options = pipeline.transformer, SamplingOptions(steps=2, guidance=1.0)
    plain = (
        generate(pipeline, ["a"], options)[0],
        davae.upscale(pipeline, picture(1, 16, 16), steps=2, guidance_scale=1.0)[0],
    )
    pipeline.transformer = torch.compile(model, backend="eager")
    try:
        shown = davae.preview(pipeline, every=1)
        drawn = generate(pipeline, ["a"], options, preview=shown)[0]
        enlarged = davae.upscale(pipeline, picture(1, 16, 16), steps=2, guidance_scale=1.0)[0]
    finally:
        pipeline.transformer = model
    assert [differ(a, b) for a, b in zip(plain, (drawn, enlarged), strict=True)] == [0, 0]
    assert list(shown.images) == [1, 2]


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_with_memory_noise_and_scaled_inputs_step_the_whole_canvas(tmp_path_factory, kind):
    pipeline = upgraded("UNet2DConditionModel", tmp_path_factory.mktemp("unet"))
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    options = {"steps": 3, "window": 16, "guidance_scale": 1.0}
    image = picture(2, 14, 8)
    one, many = (davae.upscale(pipeline, image, batch_size=size, **options)[0] for size in (1, 8))
    assert differ(one, many) <= 1


def family_size(pipeline) -> int:
    side = token_side(pipeline) * family_of(pipeline).grid
    size = max(8, side)
    size = 2 * size if size <= 16 else size
    if hasattr(pipeline, "default_sample_size") and type(pipeline).__name__ == "HiDreamImagePipeline":
        pipeline.default_sample_size = size // pixel_factor(pipeline)  # its area is the only one that it draws
    return size


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in {**BUILDERS, **VARIANTS}]
)
def test_every_family_enlarges_through_its_own_pipeline(name: str, tmp_path: Path):
    """Two images of several windows each, guided, in calls of two windows: as in one call of all, and never the noise."""
    pipeline = upgraded(name, tmp_path)
    size = family_size(pipeline)
    images = [picture(1, size // 2, size // 2), picture(2, size // 2 + 3, size // 2)]
    prompts = ["0", "1"] if name.startswith("DiT") else ["a red square", "a blue disc"]
    guidance = 1.0 if name.startswith("DiTT") else 3.0  # its null class is class 1000
    options = {"steps": 2, "window": size, "guidance_scale": guidance, "faithful": False}
    few = davae.upscale(pipeline, images, prompts, batch_size=2, **options)
    assert [image.size for image in few] == [(size, size), (size + 6, size)]
    if name in FAST:
        many = davae.upscale(pipeline, images, prompts, batch_size=9, **options)
        assert all(differ(a, b) <= 1 for a, b in zip(few, many, strict=True))


def test_a_class_conditional_velocity_model_enlarges_by_its_callback(tmp_path: Path):
    vae = davae.DetailVAE.from_base(tiny_autoencoder(), 8)
    model = LightningDiT(
        input_size=8, patch_size=1, in_channels=12, hidden_size=16, depth=1, num_heads=2, num_classes=3
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ClassConditionalPipeline(vae, model, class_names=["a", "b", "c"])
    pipeline.set_progress_bar_config(disable=True)
    image = picture(1, 20, 16)
    few, many = (
        davae.upscale(pipeline, image, "b", steps=2, batch_size=size, window=32, faithful=False)[0] for size in (1, 4)
    )
    assert few.size == (40, 32)
    assert differ(few, many) <= 1
    shown = davae.preview(pipeline, every=1)
    pipeline(["a"], num_inference_steps=2, callback_on_step_end=shown)
    assert list(shown.images) == [1, 2]
    by_name = davae.upscale(pipeline, [image] * 2, ["b", "b"], steps=2, window=32)
    for number in (1, np.int64(1), torch.tensor(1), [1, "b"], np.array([1, 1]), (1, 1)):
        found = davae.upscale(pipeline, [image] * 2, number, steps=2, window=32)
        assert [differ(*pair) for pair in zip(found, by_name, strict=True)] == [0, 0]
    with pytest.raises(ModelError, match="needs a class"):
        davae.upscale(pipeline, image)


def two_time_pipeline():
    """Return a class-conditional pipeline whose detail has a time of its own, trained with clean bases."""
    vae = davae.DetailVAE.from_base(tiny_autoencoder(), 8)
    model = LightningDiT(
        input_size=8, patch_size=1, in_channels=12, hidden_size=16, depth=1, num_heads=2, num_classes=3,
        detail_channels=8,
    ).eval()  # fmt: skip
    model.register_to_config(**{OFFSET: 0.4, CLEAN_BASE: 0.1})
    pipeline = ClassConditionalPipeline(vae, model, class_names=["a", "b", "c"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", ["flow", "noise of any size", "alphas", "two times"])
def test_the_detail_follows_the_input_s_own_down_to_half_noise(
    kind: str, pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "two times":
        pipeline = two_time_pipeline()
    elif kind != "flow":
        pipeline = upgraded("UNet2DConditionModel", tmp_path)
        scheduler = EulerDiscreteScheduler if kind.startswith("noise") else DDIMScheduler
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    step, followed, kept = Canvas.step, [], []

    def watched(self: Canvas, pipe: Any, *rest: Any) -> Tensor:
        windows = step(self, pipe, *rest)
        kept.extend([] if self.draft is None else [self.draft])
        level = level_after(pipe, self.calls, detail=True)
        _, z_d = self.layout.split(self.state)
        _, n_d = self.layout.split(self.noise)
        path = level.data * drafts[0] + level.noise * n_d
        followed.append((level.noise / (level.data + level.noise), torch.allclose(z_d, path, atol=1e-5, rtol=1e-4)))
        return windows

    image = picture(5, 16, 16)
    source = to_tensor(image)[None]
    enlarged = back_projected(F.interpolate(source, scale_factor=2, mode="bicubic"), source, 2)
    drafts = [pipeline.vae.layout.split(pipeline.vae.encode(enlarged).latent_dist.mode())[1]]
    monkeypatch.setattr(Canvas, "step", watched)
    options = {"steps": 8, "guidance_scale": 1.0, "window": 32 if kind == "two times" else None}
    davae.upscale(pipeline, image, "a", **options)
    assert not any(draft.requires_grad for draft in kept)
    assert [follows for _, follows in followed] == [share > 0.5 for share, _ in followed]
    assert {follows for _, follows in followed} == {True, False}
    followed.clear()
    davae.upscale(pipeline, image, "a", **options, faithful=False)
    assert not any(follows for _, follows in followed)


def test_back_projection_brings_any_image_back_to_its_source():
    source = to_tensor(picture(4, 16, 12))[None]
    wrong = torch.rand(1, 3, 24, 32) * 2 - 1
    error = lambda images: float((downsample(images, 2) - source).abs().mean())  # noqa: E731
    passes = [error(back_projected(wrong, source, 2, n)) for n in range(4)]
    assert passes == sorted(passes, reverse=True)
    assert passes[3] < passes[0] / 5
    right = back_projected(wrong, source, 2)
    assert float((back_projected(right, source, 2) - right).abs().max()) < 0.5


def test_a_perfect_enlargement_of_flat_artwork_stays():
    """A reduced edge overshoots, and is cut when it is saved: what is missing there is not the image's fault."""
    truth = torch.ones(1, 3, 64, 64, dtype=torch.float64)
    truth[..., 17:43, 11:52] = -1.0
    reduced = downsample(truth, 2)
    assert float(reduced.abs().max()) > 1.05
    assert torch.equal(back_projected(truth, reduced.clamp(-1, 1), 2), truth)
    blurred = F.avg_pool2d(F.pad(truth, (1, 1, 1, 1), mode="replicate"), 3, 1)
    nearer = back_projected(blurred, reduced.clamp(-1, 1), 2)
    assert float((nearer - truth).square().mean()) < float((blurred - truth).square().mean())


class HalfSeen:
    """An autoencoder in closed form: z holds the means of 2x2 pixels, z_d half of what three of them differ."""

    layout, dtype, device = LatentLayout(3, 9), torch.float64, torch.device("cpu")
    statistics = LatentStatistics(torch.full((1, 12, 1, 1), 0.25), torch.full((1, 12, 1, 1), 2.0))

    def modules(self) -> tuple:
        return ()

    def normalise(self, latents: Tensor) -> Tensor:
        return self.statistics.normalise(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        return self.statistics.denormalise(latents)

    def encode(self, images: Tensor) -> SimpleNamespace:
        z, z_d = means_and_details(images)
        latents = self.normalise(torch.cat([z, z_d / 2], dim=1))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        z, z_d = self.layout.split(self.denormalise(latents))
        d = z_d.unflatten(1, (3, 3))  # (B,colour,position,h,w)
        d = torch.cat([d, -d.sum(2, keepdim=True)], dim=2)
        return SimpleNamespace(sample=F.pixel_shuffle((z[:, :, None] + d).flatten(1, 2), 2))


def means_and_details(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B,3,2h,2w) -> means (B,3,h,w), differences of three pixels of each cell (B,9,h,w)."""
    cells = F.pixel_unshuffle(images, 2).unflatten(1, (3, 4))
    z = cells.mean(2)
    return z, (cells[:, :, :3] - z[:, :, None]).flatten(1, 2)


def test_the_detail_moves_as_back_projection_moves_the_encoded_image():
    torch.manual_seed(0)
    vae: Any = type("DetailVAE", (HalfSeen,), {})()  # davae knows by the name that it takes images without frames
    raw = torch.cat([torch.rand(1, 3, 6, 8) - 0.5, torch.rand(1, 9, 6, 8) / 8], dim=1).double()
    source = torch.rand(1, 3, 6, 8).double() - 0.5
    image = vae.decode(vae.normalise(raw)).sample.float()
    moved = means_and_details(back_projected(image, source.float(), 2))[1] - means_and_details(image)[1]
    found = vae.denormalise(back_projected_detail(vae, vae.normalise(raw), source.float()))
    torch.testing.assert_close(found[:, :3], raw[:, :3])
    torch.testing.assert_close(found[:, 3:], raw[:, 3:] + moved.double() / 2, atol=1e-6, rtol=0)
    assert float(moved.abs().max()) > 0.05


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strength": 1.5}, "strength: found 1.5"),
        ({"steps": 0}, "steps: found 0"),
        ({"times": 9}, "times: found 9"),
        ({"overlap": 0.9}, "overlap: found 0.9"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"window": 18}, "window: 18 pixels are not divisible by 8; use 16"),
        ({"window": 4096}, "4096 pixels are more than this model has positions for"),
        ({"prompts": ["a", "b"]}, "prompts: found 2 for 1 images"),
        ({"times": 4, "images": Image.new("RGB", (1024, 600))}, "image 0: 1024x600 pixels would become 16384x9600"),
        ({"strength": float("nan")}, "strength: found nan"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(pipeline, options, line: str):
    with pytest.raises(ModelError, match=line):
        davae.upscale(pipeline, **{"images": picture(1, 16, 16), **options})


def test_a_base_and_a_scheduler_without_levels_cannot_enlarge(pipeline, tiny_base: Path):
    from davae.pretrained.open import load_pipeline

    with pytest.raises(ModelError, match="without a DetailVAE cannot enlarge"):
        davae.upscale(load_pipeline(str(tiny_base)), picture(1, 16, 16))


def test_the_folder_of_an_upgrade_is_a_method_of_enlarging(pipeline, tiny_base: Path, tmp_path: Path):
    """Table S2's way: what a base drew, enlarged by its upgrade."""
    from davae.evaluate.upscale import make_upscaler

    pipeline.save_pretrained(tmp_path / "pipeline")
    (result,) = make_upscaler(str(tmp_path / "pipeline"), 32)([picture(1, 16, 16)])
    (same,) = davae.upscale(pipeline, picture(1, 16, 16), steps=20, guidance_scale=1.0, batch_size=8)
    assert differ(result, same) <= 1
    (prompted,) = make_upscaler(str(tmp_path / "pipeline"), 32)([picture(1, 16, 16)], ["a red square"])
    (same,) = davae.upscale(pipeline, picture(1, 16, 16), "a red square", steps=20, guidance_scale=1.0, batch_size=8)
    assert differ(prompted, same) <= 1 < differ(prompted, result)
    with pytest.raises(ModelError, match="without a DetailVAE cannot enlarge"):
        make_upscaler(str(tiny_base), 32)
