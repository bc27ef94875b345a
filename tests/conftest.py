"""Tiny models of the real classes, and pictures, built once."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """Keep the imported libraries out of each later garbage collection, which takes 0.3 s with them."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs {SHARED}, which is not on this machine")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _own_figures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`davae inspect` keeps figures here, not in the user's folder."""
    os.environ["DAVAE_CACHE"] = str(tmp_path_factory.mktemp("figures"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tiny_recipe():
    from davae.recipes import BaseRecipe, validate

    recipe = validate(
        {
            "kind": "base",
            "name": "tiny",
            "resolution": 16,
            "autoencoder": {"channels": [8, 8], "norm_groups": 4, "latent_channels": 4},
            "architecture": {
                "family": "sd3",
                "text_width": 16,
                "text_layers": 1,
                "vocabulary": 600,
                "text_tokens": 8,
                "layers": 2,
                "heads": 2,
                "head_width": 8,
                "max_grid": 8,
            },
            "vae": {"max_steps": 1, "batch_size": 1},
            "dit": {"max_steps": 1, "batch_size": 1},
        },
        "tiny",
    )
    assert isinstance(recipe, BaseRecipe)
    return recipe


def tiny_autoencoder(quant: bool = False, levels: int = 2, attention: bool = True):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, *[16] * (levels - 1)),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
    ).eval()


def tiny_transformer(channels: int = 4, dual: bool = False):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,) if dual else (),
    )
    for parameter in model.parameters():  # the class starts its modulation at zero: make every path matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def text_inputs(batch: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": torch.randn(batch, 5, 32, dtype=dtype),
        "pooled_projections": torch.randn(batch, 32, dtype=dtype),
        "timestep": torch.rand(batch, dtype=dtype) * 1000,
    }


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole StableDiffusion3Pipeline folder of a few thousand parameters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from davae.tasks.autoencoder import build_autoencoder
    from davae.tasks.text_to_image import (
        build_silent_t5,
        build_silent_tokenizer,
        build_text_encoder,
        build_tokenizer,
        build_transformer,
    )

    torch.manual_seed(0)
    recipe = tiny_recipe()
    tokenizer = build_tokenizer(["a red square", "a blue disc on a white background"], 600, 8)
    vae = build_autoencoder(recipe)
    vae.register_to_config(scaling_factor=0.8, shift_factor=0.05)
    architecture = recipe.architecture
    transformer = build_transformer(architecture, 4, 8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    folder = tmp_path_factory.mktemp("tiny") / "base"
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_text_encoder(architecture, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(architecture, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=build_silent_t5(architecture),
        tokenizer_3=build_silent_tokenizer(),
    ).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, width: int = 40, height: int = 36) -> Path:
    """Twelve captioned pictures."""
    folder.mkdir(exist_ok=True)
    for number in range(12):
        picture(number, width, height).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {['red', 'blue'][number % 2]} square")
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 40x36 pixels, captioned."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def tiny_upgrade_recipe(base: Path, data: Path, **changes: object) -> dict:
    """Recipe values of a run that takes seconds."""
    values: dict = {
        "name": "tiny",
        "base": {"model": str(base), "resolution": 16},
        "detail_channels": 8,
        "data": {"source": str(data)},
        "stage1": {
            "max_steps": 4,
            "batch_size": 2,
            "perceptual": "lite0",
            "gan_start": 2,
            "gan_channels": 8,
            "gan_layers": 1,
            "detail_dropout": 0.2,
            "alignment": "adaptive",
        },
        "cache": {"variants": 2, "batch_size": 4},
        "stage2": {
            "max_steps": 4,
            "batch_size": 2,
            "accumulation": 2,
            "warmup_steps": 2,
            "lora": {"rank": 2},
            "new_weight_lr_multiplier": 3,
        },
        "sampling": {"steps": 2, "prompts": ["a red square"]},
        "report": {"holdout_pictures": 4, "timing_repeats": 1},
        "run": {"log_every": 1, "checkpoint_every": 2},
    }
    for path, value in changes.items():
        node = values
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return values


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six pictures, wider than high. Read only."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(12):
        target = folder / ("golf_ball", "tench")[number % 2] / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        picture(number).save(target)
    return folder


def step_inputs(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets what the model gave to each step of a pipeline's scheduler."""
    seen: list[Tensor] = []
    stock_step = pipeline.scheduler.step

    def step(model_output: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(model_output.clone())
        return stock_step(model_output, *args, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    return seen
