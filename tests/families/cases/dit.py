"""Tiny models and pipelines of DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from cases.case import Builder, Case
from cases.ddpm_parts import autoencoder
from davae import ClassConditionalPipeline, LightningDiT


def run_di_t(model: Any, pipe: Any, x: Tensor) -> Tensor:
    B = len(x)
    return model(
        x,
        timestep=torch.full((B,), 3, dtype=torch.long),
        class_labels=torch.ones(B, dtype=torch.long),
        return_dict=False,
    )[0]


def dit(folder: Path) -> None:
    transformer = CASES["DiTTransformer2DModel"].build("DiTTransformer2DModel", num_embeds_ada_norm=1000)
    names = {"0": "a red square, square", "1": "a blue square", "7": "a disc"}
    pipeline = diffusers.DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False), id2label=names)
    pipeline.register_to_config(id2label=names)  # diffusers would forget them
    pipeline.save_pretrained(folder)


def converted_dit(folder: Path) -> None:
    """What `davae convert dit` makes of DiT's official weights."""
    model = LightningDiT(
        input_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=2,
        prediction_type="epsilon",
        learn_sigma=True,
    )
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    ClassConditionalPipeline(
        autoencoder(),
        model.eval(),
        DDPMScheduler(variance_type="learned_range", clip_sample=False),
        class_names=["a red square", "a blue square"],
    ).save_pretrained(folder)


CASES: dict[str, Case] = {
    "DiTTransformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "sample_size": 4,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 1,
        },
        run_di_t,
    ),
}
BUILDERS: dict[str, Builder] = {
    "DiTTransformer2DModel": dit,
}
VARIANTS: dict[str, Builder] = {
    "DiT, official weights": converted_dit,
}
