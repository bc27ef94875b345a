"""fp16's loss scaling: two optimizers, non-finite steps, resume; and figures logged over micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_recipe
from test_loop import Items
from torch import nn

from davae.errors import RunError
from davae.losses.reconstruction import gradient_at
from davae.recipes.sections import Reconstruction, Run
from davae.tasks.reconstruction import ReconstructionTrainer
from davae.train.loop import Trainer
from davae.train.random import SampleRandom
from davae.train.run_folder import RunFolder, newest_checkpoint, read_metrics
from davae.train.task import Trainable


class Half(nn.Module):
    """A network in half precision that returns float32, as accelerate wraps what it prepares for fp16."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.network(images).float()


class TinyGan:
    """An autoencoder of two layers and its discriminator on four images; the loss is NaN from a given step on."""

    name = "vae"

    def __init__(self, steps: int, half: bool, nan_from: int, accumulation: int, gan_start: int = 2):
        torch.manual_seed(0)
        self.settings = Reconstruction(
            max_steps=steps, batch_size=2, accumulation=accumulation, lr=1e-3, lambda_lpips=0.0, lambda_l1=1.0,
            gan_channels=8, gan_layers=1, gan_start=gan_start, gan_lr=1e-3, weight_decay=0.0,
        )  # fmt: skip
        self.nan_from, self.seen = nan_from, []
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        autoencoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), self.last)
        self.trainer = ReconstructionTrainer(self.settings, torch.device("cpu"))
        self.trainables = self.trainer.trainables(
            Trainable(autoencoder, [{"params": list(autoencoder.parameters())}], lr=1e-3)
        )
        if half:
            autoencoder = Half(autoencoder)
            self.trainer.discriminator = Half(self.trainer.discriminator)  # type: ignore[arg-type, assignment]
        self.modules: dict[str, nn.Module] = {"vae": autoencoder, **self.trainer.modules()}
        self.dataset, self.collate = Items(torch.rand(4, 3, 8, 8).unbind()), torch.stack
        self.prepare_optimizer = lambda name, optimizer: None
        self.trainables_at = self.trainer.trainables_at

    def loss(self, player: str, batch: Any, step: int, draws: SampleRandom) -> tuple[torch.Tensor, dict[str, Any]]:
        if player == "discriminator":
            return self.trainer.discriminator_loss(self.modules["discriminator"])
        reconstruction = self.modules["vae"](batch) * (float("nan") if step >= self.nan_from else 1.0)
        total, _, logged = self.trainer.autoencoder_loss(batch, reconstruction, None, None, self.last.weight, step)
        self.seen.append(float(total.detach()))
        return total, {"loss": total.detach(), **logged}


def train(
    folder: Path, steps: int, *, scaled: bool = True, half: bool = False, nan_from: int = 1000, accumulation: int = 1,
    **scale: Any,
) -> TinyGan:  # fmt: skip
    task, accelerator = TinyGan(steps, half, nan_from, accumulation), Accelerator(cpu=True)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu", **scale)
    run = Run(log_every=1, checkpoint_every=2)
    Trainer(task, run, RunFolder(folder, tiny_recipe()), accelerator).fit()  # type: ignore[arg-type]
    return task


def weights(task: TinyGan) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for player in task.trainables.values() for p in player.module.parameters()]
    )


def test_a_scaled_gan_is_the_unscaled_one(tmp_path: Path):
    """Scales are powers of two, so that float32 rounds alike: both networks are equal to the bit."""
    plain = train(tmp_path / "plain", 6, scaled=False)
    scaled = train(tmp_path / "scaled", 6)
    assert torch.equal(weights(plain), weights(scaled))
    drop = {"images_per_second"}
    mine, theirs = (
        [{k: v for k, v in r.items() if k not in drop} for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "scaled")
    )
    assert mine == theirs, "also the norms of the gradients"


def test_a_gan_in_half_precision_is_the_one_in_float32_but_for_rounding(tmp_path: Path):
    start = weights(TinyGan(1, False, 9, 1))
    single, half = (
        weights(train(tmp_path / "single", 6, scaled=False)),
        weights(train(tmp_path / "half", 6, half=True, init_scale=2.0**10)),
    )
    assert (single - half).norm() < 0.05 * (single - start).norm()


def test_a_scaled_run_of_nan_stops_saved(tmp_path: Path):
    with pytest.raises(
        RunError, match=r"vae: the loss was not finite for 10 steps in a row, until step 13; .* saved"
    ):
        train(tmp_path, 30, nan_from=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 0, 0, *range(1, 11)]
    state = newest_checkpoint(RunFolder(tmp_path / "other", tiny_recipe()), "vae")
    assert state is None
    saved = torch.load(tmp_path / "checkpoints" / "vae-00000013" / "state.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for player in saved["players"].values() for value in player.values())
    assert saved["scaler"]["scale"] < 65536


def test_a_scale_that_is_too_high_is_found_without_ending_the_run(tmp_path: Path):
    """Overflow of the scaled gradient alone: 2^40 comes down step by step, more than ten of them in a row."""
    train(tmp_path, 40, half=True, init_scale=2.0**40)
    skipped = [r["skipped"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert skipped[-1] > 10
    assert skipped[-1] == skipped[-10], "and then it trains"


def test_a_resumed_scaler_goes_on_to_the_bit(tmp_path: Path):
    options: dict[str, Any] = {"half": True, "growth_interval": 3, "init_scale": 2.0**24}
    whole = train(tmp_path / "whole", 26, **options)
    train(tmp_path / "parts", 13, **options)
    again = train(tmp_path / "parts", 26, **options)
    assert torch.equal(weights(whole), weights(again))
    states = [
        torch.load(tmp_path / name / "checkpoints" / "vae-00000026" / "state.pt", weights_only=True)["scaler"]
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1]


def test_the_next_training_starts_with_the_scaler_as_it_was(tmp_path: Path):
    """A resume between two stages starts the second with a new scaler; so does a run without a stop."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    before = accelerator.scaler.state_dict()
    folder = RunFolder(tmp_path, tiny_recipe())
    Trainer(TinyGan(5, False, 9, 1), Run(), folder, accelerator).fit()  # type: ignore[arg-type]
    assert accelerator.scaler.state_dict() == before


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_whose_every_step_was_skipped_fails(tmp_path: Path, scaled: bool):
    for _ in range(2):  # and again when it is started again
        with pytest.raises(RunError, match=r"vae: all 4 steps were skipped, .* so nothing was trained"):
            train(tmp_path, 4, scaled=scaled, nan_from=0)


def test_logged_values_are_means_over_micro_batches(tmp_path: Path):
    task = train(tmp_path, 3, scaled=False, accumulation=3)
    logged = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    means = torch.tensor(task.seen).view(3, 3).mean(1).tolist()
    assert logged == pytest.approx(means, abs=1e-6)
    assert len(set(task.seen)) > 6


def test_gradients_for_adaptive_weights_survive_half_precision():
    """The gradient of a mean over 4 million values is below half precision's smallest number."""
    weight = torch.nn.Parameter(torch.ones(1))
    half = torch.ones(1 << 12) * weight.half()
    upstream = torch.full((1 << 12,), 1e-9)
    assert gradient_at(half, weight, upstream, 1 << 30).item() == pytest.approx(4.096e-6, rel=1e-2)
    single = torch.ones(1 << 12) * weight
    exact = torch.autograd.grad(single, weight, upstream, retain_graph=True)[0]
    assert torch.equal(gradient_at(single, weight, upstream), exact)
