"""What a new patch embedder can learn of a pretrained one's tokens, and the model that is made around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_lightning_dit import random_model

from davae.backbones.lightning_layers import PatchEmbed
from davae.backbones.new_latents import change_latents
from davae.data.latent_cache.read import collate_pairs
from davae.latent import LatentStatistics
from davae.losses.embedding_alignment import token_alignment_loss
from davae.recipes import load_recipe
from davae.recipes.base import EmbedderAlignment
from davae.recipes.sections import Run
from davae.runs.dcgen import EmbedderTask
from davae.train.loop import Trainer
from davae.train.random import SampleRandom
from davae.train.run_folder import RunFolder


class Pairs(list):
    """Pairs of latents in memory."""

    def __init__(self, own: torch.Tensor, base: torch.Tensor):
        super().__init__(zip(own.numpy(), base.numpy(), strict=True))
        self.groups = np.zeros(len(own), np.int16)

    def __getitem__(self, item: Any) -> Any:
        return super().__getitem__(item[0])


def align_embedder(
    tmp_path: Path, own: torch.Tensor, base: torch.Tensor, base_embedder: PatchEmbed, patch: int, **optim: Any
) -> tuple[float, float]:
    """Error of a float64 embedder before and after it learned `base_embedder`'s tokens."""
    embedder = PatchEmbed(patch, own.shape[1], base_embedder.proj.out_channels).double()
    grids = [(1, c, 1, 1) for c in (own.shape[1], base.shape[1])]
    scales = [LatentStatistics(torch.full(grid, 0.5), torch.full(grid, 2.0)) for grid in grids]
    pairs: Any = Pairs(own, base)
    settings = EmbedderAlignment(batch_size=len(own), lr_schedule="cosine", **optim)
    task = EmbedderTask(settings, embedder, base_embedder, pairs, scales[0], scales[1], torch.device("cpu"))
    everything = collate_pairs([pairs[(number, 0)] for number in range(len(pairs))])
    draws = SampleRandom(0, "test", 0, 0, len(pairs))
    before = task.loss("embedder", everything, 0, draws)[0].item()
    run = Run(log_every=10_000, checkpoint_every=10_000)
    Trainer(task, run, RunFolder(tmp_path, load_recipe("micro-base")), Accelerator(cpu=True)).fit()
    return before, task.loss("embedder", everything, 0, draws)[0].item()


def test_a_linear_map_of_the_base_s_latents_is_learned_to_the_end(tmp_path: Path) -> None:
    """New latents = A (base latents of a token), A invertible: then some embedder gives exactly the base's tokens."""
    base = torch.randint(-4, 5, (16, 3, 4, 4)).float()
    mix = torch.eye(12) + torch.eye(12).roll(1, 1).triu(1) * torch.tensor([1.0, 0.0, -1.0]).repeat(4)
    tokens = torch.nn.functional.pixel_unshuffle(base, 2)  # (B,12,2,2): a token of patch 2
    own = torch.einsum("ij,bjhw->bihw", mix, tokens)  # integers: the map is exact in every precision
    before, after = align_embedder(tmp_path, own, base, PatchEmbed(2, 3, 16), 1, max_steps=500, lr=0.05)
    assert before > 0.1
    assert after < 1e-15 * before


def test_the_error_falls_to_the_least_squares_solution(tmp_path: Path) -> None:
    """Latents that only partly tell each other: the error ends at that of the normal equations."""
    base = torch.randn(64, 3, 2, 2)
    own = torch.cat([base[:, :2] + 0.3 * torch.randn(64, 2, 2, 2), torch.randn(64, 3, 2, 2)], dim=1)
    teacher = PatchEmbed(1, 3, 8).double()
    x = torch.cat([own.double() / 2 - 0.25, torch.ones(64, 1, 2, 2)], dim=1).transpose(0, 1).flatten(1).T
    with torch.no_grad():
        y = teacher(base.double() / 2 - 0.25).flatten(0, 1)
    best = torch.nn.functional.mse_loss(x @ torch.linalg.lstsq(x, y).solution, y).item()
    before, after = align_embedder(tmp_path, own, base, teacher, 1, max_steps=300, lr=0.05)
    assert before > 2 * best
    assert after == pytest.approx(best, rel=1e-6)


def test_the_loss_is_refused_where_grids_differ() -> None:
    with pytest.raises(ValueError, match=r"tokens are \(1, 4, 8\), the pretrained model's \(1, 16, 8\)"):
        token_alignment_loss(torch.zeros(1, 4, 8), torch.zeros(1, 16, 8))
    target = torch.ones(1, 2, 2, requires_grad=True)
    loss = token_alignment_loss(torch.zeros(1, 2, 2, requires_grad=True), target)
    loss.backward()
    assert float(loss.detach()) == 1
    assert target.grad is None


def test_an_affine_embedder_splits_noised_latents() -> None:
    """P(x_t) = (1-t) P(x_0) + t P(noise): what step 1 can match is the first term."""
    embedder, x, noise, t = PatchEmbed(2, 3, 8).double(), *torch.randn(2, 1, 3, 4, 4).double(), 0.3
    split = (1 - t) * embedder(x) + t * embedder(noise)
    torch.testing.assert_close(embedder((1 - t) * x + t * noise), split)


def test_a_moved_model_keeps_the_body_and_starts_at_zero() -> None:
    base = random_model(torch.float64, learn_sigma=True)
    moved = change_latents(base, 6, 2, 16)
    assert moved.config["out_channels"] == moved.config["in_channels"] == 6
    assert moved.dtype == torch.float64
    with torch.no_grad():
        assert not moved(torch.randn(2, 6, 16, 16).double(), torch.rand(2), torch.tensor([0, 5])).sample.any()
    kept = {n: t for n, t in moved.state_dict().items() if t.shape == base.state_dict()[n].shape}
    assert len(kept) == len(base.state_dict()) - 3  # embedder's weight, the head's weight and bias
    changed = {n for n, t in kept.items() if not torch.equal(t, base.state_dict()[n])}
    assert changed == {"x_embedder.proj.bias"}, "positions of an equal grid are equal"
