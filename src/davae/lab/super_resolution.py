"""A learned super-resolution network, trained on the same photos: the baseline of Tab. S2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.data.images import ImageDataset, collate
from davae.dataset.opened import SUMMARY, announce, open_pictures
from davae.errors import ModelError
from davae.evaluate.reconstruction import to_uint8_range
from davae.files.atomic import save_tensors
from davae.losses.perceptual import perceptual_distance
from davae.recipes.super_resolution import SuperResolution, SuperResolutionRecipe
from davae.runs.checks import check_perceptual
from davae.train.accelerator import check_base_engine, make_accelerator, seed_initial_weights
from davae.train.distributed import from_main, on_main
from davae.train.loop import Observer, Trainer, training_seed
from davae.train.random import SampleRandom
from davae.train.ready import check_trainings
from davae.train.run_folder import RunFolder, was_done
from davae.train.task import Task, Trainable
from davae.vae.blocks import downsample

WEIGHTS = "network.safetensors"


def build_network(settings: SuperResolution, scale: int) -> nn.Module:
    """Spandrel's Compact network, Real-ESRGAN's small one.

    Convolutions at low resolution, then a pixel shuffle.
    """
    try:
        from spandrel.architectures.Compact import Compact
    except ImportError as error:
        raise ModelError("super-resolution networks need `pip install 'davae[sr]'`") from error
    return Compact(num_feat=settings.channels, num_conv=settings.layers, upscale=scale)


class SuperResolutionTask(Task[SuperResolution]):
    """L1 and a perceptual distance between the enlarged and the true picture."""

    name = "network"

    def __init__(
        self, recipe: SuperResolutionRecipe, network: nn.Module, pictures: ImageDataset, device: torch.device
    ):
        self.settings, self.scale, self.dataset, self.device = recipe.network, recipe.scale, pictures, device
        self.collate = collate
        s = recipe.network
        self.perceptual = (
            perceptual_distance(s.perceptual, s.perceptual_weights).to(device) if s.lambda_lpips else None
        )
        network.to(device)
        self.trainables = {"network": Trainable(network, [{"params": list(network.parameters())}], lr=s.lr)}
        self.modules: dict[str, nn.Module] = {"network": network}

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        images = batch["images"].to(self.device)  # (B,3,sH,sW) in [-1,1]
        small = to_uint8_range(downsample(images, self.scale, "antialias"))  # (B,3,H,W) in [0,1], as from a file
        enlarged = self.modules["network"](small) * 2 - 1
        total = l1 = F.l1_loss(enlarged, images)
        logged = {"l1": l1.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(enlarged, images).mean()
            total = l1 + self.settings.lambda_lpips * distance
            logged["lpips"] = distance.detach()
        return total, {"loss": total.detach(), **logged}


def train_super_resolution(recipe: SuperResolutionRecipe, out: Path, observer: Observer) -> Path:
    """Train the recipe's network, or resume it, and return its weights file for `--upscale`."""
    if not was_done(out, "network"):
        check_perceptual(recipe.network)
    check_trainings({"network": recipe.network}, recipe.run)
    accelerator = make_accelerator(recipe.run, out)
    check_base_engine(accelerator)
    folder = RunFolder(out, recipe)
    target = out / WEIGHTS
    if not from_main(folder.done("network") and target.is_file()):
        opened = open_pictures(recipe.data, recipe.resolution, folder=out)
        opened.keep(out)
        announce(opened.summary(()), out / SUMMARY)
        pictures = opened.pictures(recipe.data, recipe.run.seed)
        seed_initial_weights(training_seed(recipe.network, recipe.run))
        network = build_network(recipe.network, recipe.scale)
        task = SuperResolutionTask(recipe, network, pictures, accelerator.device)
        trainer = Trainer(task, recipe.run, folder, accelerator, observer)
        trainer.fit(recipe.data.num_workers)
        trainer.use_average()
        on_main(partial(save_tensors, target, network.state_dict()))
        folder.mark_done("network")
    return target
