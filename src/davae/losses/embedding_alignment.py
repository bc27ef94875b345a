"""DC-Gen's embedding alignment: a new patch embedder learns the tokens of a pretrained one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_alignment_loss(tokens: Tensor, base_tokens: Tensor) -> Tensor:
    """Return the mean squared error of two embedders' tokens of one image (arXiv 2509.25180).

    For patch embedders, which are affine, and clean latents this is a linear least-squares problem.

    Args:
        tokens: of the new latents, (B,L,w), before positions are added.
        base_tokens: of the pretrained model's latents, (B,L,w); no gradient reaches them.

    Returns:
        A scalar.

    Raises:
        ValueError: grids or widths differ.
    """
    if tokens.shape != base_tokens.shape:
        raise ValueError(f"tokens are {tuple(tokens.shape)}, the pretrained model's {tuple(base_tokens.shape)}")
    return F.mse_loss(tokens, base_tokens.detach())
