"""DC-Gen (arXiv 2509.25180), baseline of Tab. 1: a base moved to another autoencoder.

The pretrained body keeps its weights; the two layers that touch the latents are new. What the public code does, in its later
states (github.com/dc-ai-projects/DC-Gen, `projects/DC-Gen/flux_t2i.md` and `dc_ai/dc_adapt`), and so does this:

1. `align.embedder`: the new patch embedder alone, by the squared error of its tokens and the pretrained embedder's tokens of
   the same image, on clean latents of both autoencoders.
2. `align.head`: patch embedder and head by the loss of the generator itself, everything between them frozen.
3. `dit`: the whole model, in davae the ordinary training of a base.

Why clean latents in step 1. A patch embedder is affine, P(x) = Wx + b, so of a noised latent x_t = (1-t) x_0 + t noise
(`davae.losses.flow_matching.interpolate`) it makes P(x_t) = (1-t) P(x_0) + t P(noise). The first term can be matched, image
by image. The second cannot: noise of the two spaces has other channels on another grid, and no draw of one belongs to a
draw of the other. What the new embedder makes of noise is left to step 2.

What is ours:

- The pretrained autoencoder sees the image at `align.base_resolution`, where it gives as many tokens as the new one does
  at the recipe's resolution. DC-Gen shows both the same pixels and pools or enlarges tokens until the grids agree.
- Positions are left out of the comparison: on equal grids they are the same in both tokens.
- The head is LightningDiT's whole final layer, as in DC-Gen's DiT (its FLUX trains the last matrix alone). Its matrix starts
  at zero, its modulation as pretrained.
- The base is a velocity model and goes on by flow matching; DC-Gen's class-conditional one is a DiT that predicts epsilon.
- Steps and learning rates of the shipped recipe.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from davae.backbones.lightning_dit import LightningDiT
from davae.backbones.lightning_layers import PatchEmbed
from davae.backbones.new_latents import EMBEDDER, HEAD
from davae.data.latent_cache.meta import is_whole, read_meta
from davae.data.latent_cache.read import CachedLatents, PairedLatents, collate_pairs
from davae.dataset.encoding import run_precision
from davae.errors import ModelError, RecipeError
from davae.latent import LatentStatistics
from davae.losses.embedding_alignment import token_alignment_loss
from davae.pretrained.autoencoders import autoencoder_config, load_autoencoder
from davae.pretrained.open import load_part
from davae.pretrained.shapes import read_shapes
from davae.recipes.base import BaseRecipe, EmbedderAlignment
from davae.recipes.sections import FlowOptim
from davae.runs.base import BaseRun
from davae.runs.cache import cache_images, cache_key
from davae.tasks.autoencoder import build_autoencoder
from davae.tasks.class_conditional import ClassFlowTask
from davae.train.distributed import from_main
from davae.train.random import SampleRandom
from davae.train.task import Task, Trainable
from davae.vae.codec import Codec, latent_shape
from davae.zoo import resolve

FAMILY = "LightningDiT"
BASE_CACHE = "cache-base"  # the images of `cache` under the pretrained model's autoencoder

# -- what a recipe can get wrong -------------------------------------------------------------------------------------


def new_factor(recipe: BaseRecipe) -> int:
    """Pixels per latent position of the recipe's autoencoder, without a weight."""
    if isinstance(recipe.autoencoder, str):
        config = autoencoder_config(resolve(recipe.autoencoder))[1]
        try:
            return latent_shape(config, str(config.get("_class_name")))[0]
        except ValueError as error:
            raise ModelError(f"{recipe.autoencoder}: {error}") from error
    with torch.device("meta"):
        vae = build_autoencoder(recipe)
    return latent_shape(vae.config, type(vae).__name__)[0]


def check_grids(recipe: BaseRecipe) -> None:
    """Check by configs that pretrained and new model have the same grid of tokens.

    Raises:
        RecipeError: they do not, with the base_resolution that would do.
    """
    assert recipe.align is not None
    assert recipe.init is not None
    shapes = read_shapes(resolve(recipe.init))
    step, base_step = new_factor(recipe) * recipe.architecture.patch_size, shapes.vae_factor * shapes.patch_size
    grid, odd = divmod(recipe.resolution, step)
    if odd:
        raise RecipeError(f"resolution: {recipe.resolution} is not divisible by {step}, the pixels of a token")
    if recipe.align.base_resolution != grid * base_step:
        found = recipe.align.base_resolution / base_step
        raise RecipeError(
            f"align.base_resolution: the new model has {grid}x{grid} tokens at {recipe.resolution} px, {recipe.init} has "
            f"{found:g}x{found:g} at {recipe.align.base_resolution} px; use {grid * base_step}"
        )


def check_other_space(recipe: BaseRecipe, vae: nn.Module) -> None:
    """Refuse an autoencoder that encodes as the pretrained model's own does."""
    assert recipe.init is not None
    own, base = encoding_weights(vae), encoding_weights(load_autoencoder(resolve(recipe.init)))
    if own.keys() == base.keys() and all(torch.equal(own[name].cpu(), base[name]) for name in own):
        raise RecipeError(
            f"autoencoder: it encodes as the autoencoder of init {recipe.init} does, so the latents are the same and there "
            "is nothing to align; leave out align, or give another autoencoder"
        )


def encoding_weights(vae: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an autoencoder that determine its latents."""
    return {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}


# -- the two steps ---------------------------------------------------------------------------------------------------


class EmbedderTask(Task[EmbedderAlignment]):
    """Step 1: the new patch embedder alone.

    Args:
        embedder: the new one; its dtype is the one that is computed in.
        base_embedder: the pretrained one, frozen.
        pairs: both latents of each image.
        statistics, base_statistics: of the two latents, by which they are normalised.
    """

    name = "align.embedder"

    def __init__(
        self,
        settings: EmbedderAlignment,
        embedder: PatchEmbed,
        base_embedder: PatchEmbed,
        pairs: PairedLatents,
        statistics: LatentStatistics,
        base_statistics: LatentStatistics,
        device: torch.device,
    ):
        self.settings, self.dataset, self.collate = settings, pairs, collate_pairs
        dtype = embedder.proj.weight.dtype
        self.place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.statistics = statistics.to(device, dtype)
        self.base_statistics = base_statistics.to(device, dtype)
        self.base_embedder = base_embedder.to(**self.place).requires_grad_(False)
        embedder.to(device).requires_grad_(True)
        self.trainables = {"embedder": Trainable(embedder, [{"params": list(embedder.parameters())}], lr=settings.lr)}
        self.modules: dict[str, nn.Module] = {"embedder": embedder}

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        """Return the alignment error and, `unexplained`, its share of the tokens' variance."""
        with torch.no_grad():
            base_tokens = self.base_embedder(self.base_statistics.normalise(batch["base_latents"].to(**self.place)))
            variance = base_tokens.var(dim=(0, 1), unbiased=False).mean()
        tokens = self.modules["embedder"](self.statistics.normalise(batch["latents"].to(**self.place)))  # (B,L,w)
        error = token_alignment_loss(tokens, base_tokens)
        return error, {"loss": error.detach(), "unexplained": error.detach() / variance}


class HeadTask(ClassFlowTask):
    """Step 2: patch embedder and head by flow matching on the new latents, the body frozen."""

    name = "align.head"

    def chosen_settings(self, recipe: BaseRecipe) -> FlowOptim:
        assert recipe.align is not None
        return recipe.align.head

    def choose(self, transformer: LightningDiT) -> list[nn.Parameter]:
        transformer.requires_grad_(False)
        for part in (EMBEDDER, HEAD):
            transformer.get_submodule(part).requires_grad_(True)
        return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


# -- a run -----------------------------------------------------------------------------------------------------------


class DCGenRun(BaseRun):
    """Run that moves a pretrained body into another autoencoder's latents and fine-tunes it."""

    def check_recipe(self) -> None:
        """Check sizes, and that both models have the same grid of tokens."""
        super().check_recipe()
        check_grids(self.recipe)

    def check_autoencoder(self, vae: Any) -> None:
        """Check that the new latents differ from the pretrained ones."""
        check_other_space(self.recipe, vae)

    def prepare_transformer(self, transformer: LightningDiT, cache: CachedLatents, vae: Any) -> None:
        """Align the embedder, then embedder and head, each from its newest checkpoint.

        Args:
            transformer: the pretrained body behind a new embedder and head; changed in place.
            cache: of the new latents, with class numbers.
            vae: the new autoencoder.

        Raises:
            DataError: the two caches do not belong together.
        """
        recipe, device = self.recipe, self.accelerator.device
        assert recipe.align is not None
        assert recipe.init is not None
        statistics = Codec(vae).statistics
        base_vae = load_autoencoder(resolve(recipe.init)).to(device)
        self.cache_base(base_vae)
        pairs = PairedLatents(self.first / "cache", self.out / BASE_CACHE)
        base_embedder = load_part(resolve(recipe.init), "transformer", FAMILY).x_embedder
        # copies are trained: an engine may wrap what it trains, and wraps nothing twice
        embedder = copy.deepcopy(transformer.x_embedder)
        task = EmbedderTask(
            recipe.align.embedder, embedder, base_embedder, pairs, statistics, Codec(base_vae).statistics, device
        )
        del base_vae
        self.fit(task, release=True)
        transformer.x_embedder.load_state_dict(embedder.state_dict())
        learner = copy.deepcopy(transformer)
        self.fit(HeadTask(recipe, learner, cache, statistics, device), release=True)
        transformer.load_state_dict(learner.state_dict())

    def cache_base(self, base_vae: Any) -> None:
        """Cache the training images, augmented alike, under the pretrained model's autoencoder."""
        recipe, target = self.recipe, self.out / BASE_CACHE
        assert recipe.align is not None
        base_resolution = recipe.align.base_resolution
        own_key = cache_key(
            base_vae, self.opened, recipe.data, recipe.cache, resolution=recipe.resolution, seed=recipe.run.seed
        )
        key = {**own_key, "preprocessing": {**own_key["preprocessing"], "base_resolution": base_resolution}}
        if from_main(is_whole(target)):
            read_meta(target, key)
            return
        cache_images(
            target,
            self.images,
            base_vae,
            key=key,
            cache=recipe.cache,
            precision=run_precision(recipe.run),
            smaller=recipe.resolution // base_resolution,
            num_workers=recipe.data.num_workers,
            accelerator=self.accelerator,
            watch=lambda name: self.watch(f"base {name}"),
        )
