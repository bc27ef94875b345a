"""Upgraded tiny pipelines of every family, assembled without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import BUILDERS, VARIANTS

from davae.backbones.expand import expand_transformer
from davae.backbones.families import denoiser
from davae.pretrained.open import load_pipeline
from davae.pretrained.shapes import read_shapes
from davae.publish.assemble import assemble
from davae.vae.detail_vae import DetailVAE


def assembled(base: Path) -> Any:
    """Return the upgrade of a base pipeline's folder: new weights of the detail are random, so that every path matters."""
    pipeline = load_pipeline(str(base))
    channels = 2 * read_shapes(str(base)).channels
    vae = DetailVAE.from_base(pipeline.vae, channels)
    transformer = expand_transformer(denoiser(pipeline), channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return assemble(pipeline, vae, transformer)


def upgraded(name: str, folder: Path) -> Any:
    """Build a tiny base of a family in `folder` and return its upgrade."""
    torch.manual_seed(0)
    {**BUILDERS, **VARIANTS}[name](folder / "base")
    return assembled(folder / "base")
