"""Class-conditional transformer on plain latents, from scratch or from a pretrained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.lightning_dit import LightningDiT
from davae.backbones.new_latents import change_latents
from davae.backbones.repatch import change_patch
from davae.backbones.trainable import choose_trainable
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.errors import ModelError
from davae.latent import LatentStatistics
from davae.losses.velocity import direction_loss
from davae.pretrained.open import load_pipeline
from davae.pretrained.placement import send
from davae.pretrained.shapes import read_shapes
from davae.recipes.base import BaseRecipe, ClassArchitecture
from davae.recipes.sections import FlowOptim
from davae.tasks.conditioning import conditioning
from davae.tasks.noising import drop_conditions, flow_matching, noise_batch
from davae.train.random import SampleRandom
from davae.train.task import Task, Trainable
from davae.zoo import resolve


def build_class_transformer(recipe: BaseRecipe, channels: int, latent_side: int) -> LightningDiT:
    """Return the recipe's LightningDiT, new or with the weights of `init` on the recipe's grid.

    Where the recipe aligns it with another autoencoder, embedder and head are new.

    Args:
        recipe: of a class-conditional base.
        channels, latent_side: shape of a latent.

    Raises:
        ModelError: `init` has another width, depth, number of channels or classes than the recipe.
    """
    a, sizes = recipe.architecture, own_sizes(recipe)
    if recipe.init is None:
        return LightningDiT(input_size=latent_side, patch_size=a.patch_size, in_channels=channels, **sizes)
    check_start(recipe, channels)
    start = load_pipeline(resolve(recipe.init)).transformer
    if recipe.align is not None:
        return change_latents(start, channels, a.patch_size, latent_side)
    return change_patch(start, a.patch_size, latent_side)


def check_start(recipe: BaseRecipe, channels: int) -> None:
    """Check by its configs that `init` can be the start of a recipe.

    Raises:
        ModelError: another family, width, depth, objective, number of channels or of classes.
    """
    assert recipe.init is not None
    shapes = read_shapes(resolve(recipe.init))
    if shapes.transformer_class != LightningDiT.__name__:
        raise ModelError(f"init {recipe.init} is a {shapes.transformer_class}; set init to a LightningDiT")
    wanted = {**own_sizes(recipe), "prediction_type": "velocity"}  # it goes on by flow matching
    if recipe.align is None:
        wanted["in_channels"] = channels
    for name, value in wanted.items():
        if (found := shapes.transformer_config[name]) != value:
            raise ModelError(
                f"init {recipe.init} has {name} {found}, the recipe has {value}; "
                "set the recipe's architecture to the pretrained one's"
            )


def own_sizes(recipe: BaseRecipe) -> dict[str, Any]:
    """Return the sizes that another latent space or patch size leaves as they are."""
    assert isinstance(recipe.architecture, ClassArchitecture)
    return recipe.architecture.model_dump(exclude={"family", "patch_size"})


class ClassFlowTask(Task[FlowOptim]):
    """Flow matching on cached latents with class labels, with the loss of direction or without."""

    name = "dit"

    def __init__(
        self,
        recipe: BaseRecipe,
        transformer: LightningDiT,
        cache: CachedLatents,
        statistics: LatentStatistics,
        device: torch.device,
    ):
        self.settings = self.chosen_settings(recipe)
        self.objective = flow_matching(self.settings)
        self.dataset, self.collate, self.device = cache, collate_latents, device
        self.statistics = statistics.to(device, torch.float32)
        transformer.to(device)  # type: ignore[arg-type]
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.conditioning = conditioning(transformer, cache, device)
        parameters = self.choose(transformer)
        self.trainables = {"dit": Trainable(transformer, [{"params": parameters}], lr=self.settings.lr)}
        self.modules: dict[str, nn.Module] = {"dit": transformer}

    def chosen_settings(self, recipe: BaseRecipe) -> FlowOptim:
        """Return the recipe's section of this training."""
        return recipe.dit

    def choose(self, transformer: LightningDiT) -> list[nn.Parameter]:
        """Mark the weights that are trained and return them in module order."""
        return choose_trainable(transformer, None)

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        s = self.settings
        latents = send(batch["latents"], self.device)
        z = self.statistics.normalise(latents)  # (B,C,h,w)
        conditions = drop_conditions(batch["conditions"], self.conditioning.null, s.caption_dropout, draws)
        noised = noise_batch(self.objective, z, draws)
        velocity = self.conditioning.predict(self.modules["dit"], noised.x_t, noised.t, conditions)
        error = (velocity.float() - noised.target).square().mean()
        if s.cosine_loss == "off":
            return error, {"loss": error.detach()}
        direction = direction_loss(velocity, noised.target)
        total = error + direction
        return total, {"loss": total.detach(), "loss_velocity": error.detach(), "loss_direction": direction.detach()}
