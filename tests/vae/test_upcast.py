"""SDXL's `force_upcast`: an autoencoder that overflows in float16 runs in float32 in stock pipelines, upgraded too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cases.stable_diffusion import stable_diffusion_xl
from conftest import tiny_autoencoder

from davae import DetailVAE, expand_transformer
from davae.analyze.sensitivity import reconstructions
from davae.publish.assemble import assemble
from davae.vae.overflow import in_range


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny SDXL in float16 whose autoencoder overflows, plain and upgraded, saved and opened again."""
    folder = tmp_path_factory.mktemp("sdxl")
    stable_diffusion_xl(folder / "base")
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "base")
    for half in (base.vae.encoder, base.vae.decoder):
        half.mid_block.resnets[0].conv2.weight.data *= 100.0
        half.mid_block.resnets[0].norm2.weight.data *= 1e4
    assert base.vae.config.force_upcast
    base.save_pretrained(folder / "base")
    upgraded = assemble(base, DetailVAE.from_base(base.vae, 4), expand_transformer(base.unet, 4))
    upgraded.save_pretrained(folder / "upgraded")
    return {
        name: diffusers.StableDiffusionXLPipeline.from_pretrained(folder / name, torch_dtype=torch.float16)
        for name in ("base", "upgraded")
    }


def draw(pipeline: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    if "image" not in options:
        options |= {"height": 32, "width": 32}
    return pipeline("a red square", num_inference_steps=2, guidance_scale=1.0, output_type="np", **options).images


@pytest.mark.parametrize("name", ["base", "upgraded"])
def test_a_decoder_that_overflows_is_upcast(pipelines: dict[str, Any], name: str):
    pipeline = pipelines[name]
    with torch.no_grad():
        plain = pipeline.vae.decode(torch.randn(1, pipeline.vae.config.latent_channels, 4, 4).half()).sample
    assert not torch.isfinite(plain).all(), "it does overflow by itself"
    images = draw(pipeline)
    assert np.isfinite(images).all()
    assert images.std() > 0
    assert pipeline.vae.dtype == torch.float16, "as it was"


@pytest.mark.parametrize("name", ["base", "upgraded"])
def test_an_encoder_that_overflows_is_upcast(pipelines: dict[str, Any], name: str):
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**pipelines[name].components)
    assert np.isfinite(draw(pipeline, image=torch.rand(1, 3, 32, 32), strength=0.9)).all()


def test_the_flag_is_the_base_s_also_in_older_folders(tmp_path: Path):
    for asked in (True, False):
        base = tiny_autoencoder()
        base.register_to_config(force_upcast=asked)
        vae = DetailVAE.from_base(base, 4)
        assert vae.config.force_upcast is asked
        vae.register_to_config(force_upcast=False)  # what folders written by earlier versions hold
        vae.save_pretrained(tmp_path / str(asked))
        assert DetailVAE.from_pretrained(tmp_path / str(asked)).config.force_upcast is asked


@pytest.mark.parametrize("method", ["full", "base + bicubic", "zero detail"])
def test_reconstructions_in_float16_are_finite_where_the_autoencoder_overflows(
    pipelines: dict[str, Any], method: str
):
    """A report of a run in fp16 reads them from the autoencoder itself, not from a pipeline that upcasts it."""
    vae, base_vae = pipelines["upgraded"].vae, pipelines["base"].vae
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = vae.decode(vae.encode(images.half()).latent_dist.mode()).sample
    assert not torch.isfinite(plain).all()
    found = reconstructions(vae, base_vae)[method](images)
    assert found.shape == images.shape
    assert torch.isfinite(found).all()
    assert (vae.dtype, base_vae.dtype) == (torch.float16, torch.float16), "as they were"


def test_work_is_done_again_in_float32_only_where_float16_overflows(caplog: pytest.LogCaptureFixture):
    vae = torch.nn.Linear(1, 1, bias=False)
    vae.weight.data.fill_(2.0)
    vae.device = torch.device("cpu")
    calls: list[torch.dtype] = []

    def work(values: torch.Tensor) -> torch.Tensor:
        calls.append(values.dtype)
        return vae(values)

    for dtype, value, expected in (
        (torch.float16, 1.0, [torch.float16]),
        (torch.float16, 60_000.0, [torch.float16, torch.float32]),
        (torch.float16, torch.nan, [torch.float16]),
        (torch.bfloat16, torch.inf, [torch.bfloat16]),
    ):
        calls.clear()
        caplog.clear()
        vae.to(dtype).dtype = dtype
        found = in_range(vae, work, torch.tensor([[value]]))
        assert calls == expected
        assert vae.weight.dtype == dtype
        assert bool(caplog.text) == (len(expected) == 2)
        if value == 60_000.0:
            assert found.item() == 120_000.0


@pytest.mark.parametrize("place", ["conv_out", ""])
def test_an_offloaded_autoencoder_gets_its_values_where_it_computes(place: str):
    """Between its turns its own device is the CPU, or none: `--offload model` hooks the whole, `sequential` each layer."""
    vae: Any = tiny_autoencoder(4)
    part = vae.encoder.get_submodule(place) if place else vae
    part._hf_hook = SimpleNamespace(execution_device="meta")
    assert in_range(vae, lambda values: values, torch.zeros(1)).device.type == "meta"
    del part._hf_hook
    assert in_range(vae, lambda values: values, torch.zeros(1)).device.type == "cpu"
