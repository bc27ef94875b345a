"""Other diffusers pipelines around an upgraded model: the table of docs/export.md."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from cases.stable_diffusion import stable_diffusion_xl

from davae import DetailVAE, expand_transformer
from davae.backbones.families import denoiser
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import assemble

IMAGE, MASK = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)


@pytest.fixture(scope="module")
def upgraded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Stable Diffusion 3 and a tiny SDXL, upgraded."""
    stable_diffusion_xl(tmp_path_factory.mktemp("sdxl") / "base")
    found = {}
    for name, folder in (("SD3", tiny_base), ("SDXL", max(tmp_path_factory.getbasetemp().glob("sdxl*/base")))):
        base = load_pipeline(str(folder))
        channels = base.vae.config.latent_channels
        wide = expand_transformer(denoiser(base), channels)
        found[name] = assemble(base, DetailVAE.from_base(base.vae, channels), wide)
    return found


def draw(pipeline: Any, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    options |= {"image": IMAGE, "strength": 1.0, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    return pipeline("a red square", **options).images


CLASSES = {
    "SD3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "SDXL": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_image_to_image_takes_the_autoencoder_by_name(upgraded: dict[str, Any], name: str):
    """`from_pipe` compares classes exactly: without `vae=` it looks for another autoencoder."""
    kind = getattr(diffusers, CLASSES[name][0])
    with pytest.raises(ValueError, match="expected"):
        kind.from_pipe(upgraded[name])
    images = draw(kind.from_pipe(upgraded[name], vae=upgraded[name].vae))
    assert images.shape == (1, 3, 32, 32)
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("name", CLASSES)
def test_inpainting_knows_its_own_numbers_of_channels_alone(upgraded: dict[str, Any], name: str):
    pipeline = getattr(diffusers, CLASSES[name][1]).from_pipe(upgraded[name], vae=upgraded[name].vae)
    with pytest.raises(ValueError, match="channels"):
        draw(pipeline, mask_image=MASK, height=32, width=32)


@pytest.mark.parametrize("name", CLASSES)
def test_loading_warns_of_other_classes_alone(
    upgraded: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A DetailVAE in place of the class in a pipeline's signature is no fault; a wrong text encoder is."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)  # davae's command line lets errors alone through
    kind = type(upgraded[name])

    def advice(part: str, given: Any) -> set[str]:
        """The line that diffusers logs in `from_pretrained`."""
        caplog.clear()
        logger.warning(f"Expected types for {part}: {kind.__init__.__annotations__[part]}, got {type(given)}.")
        return set(caplog.messages)

    assert advice("vae", upgraded[name].vae) == set()
    assert len(advice("vae", upgraded[name].text_encoder)) == 1
    assert len(advice("text_encoder", upgraded[name].vae)) == 1


def test_a_pipeline_with_a_detail_vae_opens_without_a_warning(
    upgraded: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(
        logging.WARNING, "diffusers.pipelines.pipeline_utils"
    )  # davae's command line lets errors alone through
    upgraded["SD3"].save_pretrained(tmp_path)
    opened = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert isinstance(opened.vae, DetailVAE)
    assert not [message for message in caplog.messages if "Expected types" in message]
