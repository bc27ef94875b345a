"""Alignment of [z, z_d] inside the frozen transformer (GRACE, Eq. 7-10)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.call import Call, Parts
from davae.backbones.families import family_of
from davae.backbones.first_blocks import block_features, first_blocks
from davae.backbones.lightning_dit import LightningDiT
from davae.latent import LatentLayout
from davae.losses.feature_alignment import feature_alignment_loss, upsampled_tokens
from davae.pretrained.placement import send
from davae.tasks.noising import Objective
from davae.train.random import SampleRandom


class AlignmentAdapter(nn.Module):
    """Trained parts next to the frozen transformer: W_in^res and the P_l of Eq. 8.

    W_in^res takes z_d into the tokens, in addition to the pretrained embedder of z. P_l is a residual of two layers for each
    block. W_in^res and the second layers start at zero, so that training starts from the pretrained features of z. The SiLU
    between the layers is ours.

    Args:
        transformer: whose embedder is a convolution.
        detail_channels: D.
        layers: blocks that are compared.
        width: of a block's tokens.
        rank: width between the two layers; 16 in GRACE.
    """

    def __init__(self, transformer: nn.Module, detail_channels: int, layers: int, width: int, rank: int):
        super().__init__()
        embedder = transformer.get_submodule(family_of(transformer).embedder)
        assert isinstance(embedder, nn.Conv2d)
        patch: Any = embedder.kernel_size
        self.entry = nn.Conv2d(detail_channels, embedder.out_channels, patch, stride=patch, bias=False)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank), nn.SiLU(), nn.Linear(rank, width)) for _ in range(layers)
        )
        for layer in (self.entry, *(projection[2] for projection in self.projections)):  # type: ignore[index]
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        # the transformer itself is frozen and belongs to no optimizer, engine or checkpoint: not a submodule
        self._embedder = (embedder,)

    def forward(self, features: FrozenFeatures, full: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the loss of noised [z, z_d].

        Args:
            features: of the frozen transformer.
            full: noised z_pre (B,C,sh,sw).
            x_t: noised [z, z_d] (B,C+D,h,w).
            t: (B,), of both.
        """
        with torch.no_grad():
            targets = features.tokens(full, t)
        z, z_d = features.layout.split(x_t)
        added = self.entry(z_d)

        def add(embedder: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + added.to(output)

        handle = self._embedder[0].register_forward_hook(add)
        try:
            own = features.tokens(z, t)
        finally:
            handle.remove()
        raised = [upsampled_tokens(tokens, features.grid(z), features.grid(full)) for tokens in own]
        mapped = [tokens + projection(tokens) for tokens, projection in zip(raised, self.projections, strict=True)]
        return feature_alignment_loss(mapped, targets)


class FrozenFeatures:
    """Features of a frozen transformer's first blocks, and the loss that compares two latents.

    From GRACE: the full-size latent z_pre, of the frozen base encoder on the whole image, is the target (Eq. 7); both latents
    are noised at one level with noise of their own; the tokens of [z, z_d] are interpolated to the grid of z_pre and mapped
    by P_l (Eq. 8); the cosines of the first quarter of the blocks are summed (Eq. 9).

    Ours: the condition is the empty caption or the null class, as stage 1 keeps no text encoders (GRACE: the caption); levels
    are those of the recipe's stage 2; z_d is its posterior mean, not normalised; on another grid than its own, a LightningDiT
    has interpolated positions.

    Args:
        transformer: pretrained; it is frozen here.
        call: of its family.
        layout: C, D and s.
        objective: noises latents.
        null: the empty condition (1,...), one tensor a kind.
        depth: share of the blocks.
    """

    def __init__(
        self,
        transformer: nn.Module,
        call: Call,
        layout: LatentLayout,
        objective: Objective,
        null: Parts,
        depth: float,
    ):
        self.transformer = transformer.requires_grad_(False).eval()
        self.call, self.layout, self.objective, self.null = call, layout, objective, null
        self.config: Any = transformer.config
        self.blocks = first_blocks(transformer, depth)

    def adapter(self, rank: int) -> AlignmentAdapter:
        """Return the trained parts, at their start."""
        embedder = self.transformer.get_submodule(family_of(self.transformer).embedder)
        width = int(embedder.out_channels)  # type: ignore[arg-type]
        return AlignmentAdapter(self.transformer, self.layout.detail_channels, len(self.blocks), width, rank)

    def to(self, device: torch.device) -> FrozenFeatures:
        """Move transformer and condition to a device, in place."""
        self.transformer.to(device)
        self.null = tuple(part.to(device) for part in self.null)
        return self

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Return rows and columns of tokens of latents (B,c,h,w)."""
        patch = int(self.config[family_of(self.transformer).patch_key])
        return latents.shape[-2] // patch, latents.shape[-1] // patch

    def tokens(self, z: Tensor, t: Tensor) -> list[Tensor]:
        """Return the tokens (B,L,w) of noised z (B,C,h,w) at t (B,) after each of the blocks."""
        parts = tuple(part.expand(len(z), *part.shape[1:]) for part in self.null)
        z = z.to(next(self.transformer.parameters()).dtype)  # weights of the base may be in half precision
        on_grid: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.transformer, LightningDiT):
            on_grid = self.transformer.at_grid(z.shape[-1])
        with on_grid:
            return block_features(self.blocks, lambda: self.call.predict(self.transformer, self.config, z, t, parts))

    def loss(self, adapter: nn.Module, full: Tensor, latents: Tensor, draws: SampleRandom) -> Tensor:
        """Return L_align of normalised latents.

        Args:
            adapter: an `AlignmentAdapter`, or a wrapper around one.
            full: z_pre (B,C,sh,sw).
            latents: [z, z_d] (B,C+D,h,w), with gradient.
            draws: of the batch.
        """
        t = send(self.objective.draw(draws.samples), latents.device)
        noises = [send(draws.normal(*one.shape[1:]), one.device).to(one) for one in (full, latents)]
        noised, x_t = (
            self.objective.noised(one, noise, t) for one, noise in zip((full, latents), noises, strict=True)
        )
        return adapter(self, noised, x_t, t)
