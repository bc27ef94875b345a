"""Which of diffusers' other pipelines, schedulers and base add-ons work with an upgraded model: docs/three-jobs.md's table.

Each row of the table is a test here; a row that does not work is tested to fail as the table describes.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from upgraded_tiny import assembled, upgraded

import davae
from davae.backbones.families import denoiser

DRAW = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def sd3(tiny_base: Path):
    return assembled(tiny_base)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory):
    return upgraded("UNet2DConditionModel", tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory):
    return upgraded("FluxTransformer2DModel", tmp_path_factory.mktemp("flux"))


def mask(size: int) -> Image.Image:
    half = Image.new("L", (size, size), 0)
    half.paste(255, (0, 0, size // 2, size))
    return half


@pytest.mark.parametrize("name", ["sd3", "unet", "flux"])
def test_image_to_image_works(name: str, request: pytest.FixtureRequest):
    pipeline = AutoPipelineForImage2Image.from_pipe(request.getfixturevalue(name))
    image, size = (
        picture(1, 32, 32),
        {"height": 32, "width": 32},
    )  # FLUX's enlarges the image to its own size without them
    options = {k: v for k, v in size.items() if k in inspect.signature(pipeline.__call__).parameters} | DRAW
    drawn = [pipeline("a", image=image, strength=s, **options).images[0] for s in (0.5, 1.0)]
    assert drawn[0].size == (32, 32)
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))


def inpainted(pipeline) -> Image.Image:
    options = {"height": 32, "width": 32, "strength": 1.0, **DRAW}
    wrapped = AutoPipelineForInpainting.from_pipe(pipeline)
    return wrapped("a", image=picture(1, 32, 32), mask_image=mask(32), **options).images[0]


def test_inpainting_works_for_flux_and_not_where_the_stock_class_has_the_channels_in_its_code(flux, sd3, unet):
    assert inpainted(flux).size == (32, 32)
    for pipeline, known in ((sd3, "16 input channels"), (unet, "4 or 9 input channels")):
        with pytest.raises(ValueError, match=known):
            inpainted(pipeline)


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler])
def test_schedulers_of_flows_draw_and_enlarge(kind, sd3):
    own = sd3.scheduler
    try:
        sd3.scheduler = kind.from_config(own.config)
        assert sd3("a", height=32, width=32, **DRAW).images[0].size == (32, 32)
        assert davae.upscale(sd3, picture(1, 16, 16), steps=2, guidance_scale=1.0)[0].size == (32, 32)
    finally:
        sd3.scheduler = own


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, LCMScheduler, EulerDiscreteScheduler]
)
def test_schedulers_of_ddpm_models_draw_and_enlarge(kind, unet):
    own = unet.scheduler
    try:
        unet.scheduler = kind.from_config(own.config)
        assert unet("a", height=32, width=32, **DRAW).images[0].size == (32, 32)
        result = davae.upscale(unet, picture(1, 16, 16), steps=2, guidance_scale=1.0, window=32)
        assert result[0].size == (32, 32)
    finally:
        unet.scheduler = own


def test_a_lora_of_the_base_is_widened(sd3):
    """`davae.widen_lora`: layers inside load as they are, those of the embedder and head get zeros for the detail."""
    model = denoiser(sd3)
    layer, width = "transformer.transformer_blocks.0.attn.to_q", model.transformer_blocks[0].attn.to_q.weight.shape[0]
    state = {f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(width, 2)}
    before = np.asarray(sd3("a", height=32, width=32, generator=torch.Generator().manual_seed(0), **DRAW).images[0])
    sd3.load_lora_weights(davae.widen_lora(state, model))
    after = np.asarray(sd3("a", height=32, width=32, generator=torch.Generator().manual_seed(0), **DRAW).images[0])
    sd3.unload_lora_weights()
    assert not np.array_equal(before, after)


def test_a_controlnet_of_the_base_takes_the_base_s_channels(sd3):
    """A ControlNet reads the noisy latents: one for C channels meets C+D. The row is `no`, and this is its error."""
    base = SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    components = {
        name: part for name, part in sd3.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    pipeline = StableDiffusion3ControlNetPipeline(**components, controlnet=base)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="channels"):
        pipeline("a", control_image=picture(1, 32, 32), height=32, width=32, **DRAW)
