"""Recipes of base models, trained on plain latents: BaseRecipe and its parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from davae.recipes.fields import Fraction, Layers, Pixels, RecipeName, Section, Width
from davae.recipes.sections import Cache, Data, FlowOptim, Optim, Reconstruction, Run, Sampling


class Autoencoder(Section):
    """Sizes of a small AutoencoderKL or deep-compression AutoencoderDC, trained from scratch."""

    family: Literal["kl", "dc"] = Field(
        default="kl",
        description="`kl`: an AutoencoderKL. `dc`: an AutoencoderDC, which is deterministic and has no KL loss.",
    )
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=10)] = Field(
        description="Channels of each level, from the image inwards; each level but the first halves the side."
    )
    layers: Layers = Field(default=1, description="Residual blocks of each level.")
    norm_groups: Width = Field(default=8, description="Groups of the normalisation, of `kl` alone.")
    latent_channels: Width = Field(description="Channels of the latent.")

    @model_validator(mode="after")
    def _shortcuts_fit(self) -> Autoencoder:
        """Check that a dc autoencoder's shortcuts can average positions and channels."""
        if self.family == "kl":
            return self
        for upper, lower in pairwise(self.channels):
            if 4 * upper % lower or lower % 4:
                raise ValueError(
                    f"channels: {upper} then {lower}: in a dc autoencoder each must be a multiple of 4 and divide 4 times "
                    "the one before"
                )
        if self.channels[-1] % self.latent_channels:
            raise ValueError(
                f"latent_channels is {self.latent_channels}; in a dc autoencoder it must divide the last of channels, "
                f"{self.channels[-1]}"
            )
        return self


NAMED, OWN = "(name)", "(sizes)"  # tags of an autoencoder in the path of what is wrong with it
AutoencoderChoice = Annotated[
    Annotated[Autoencoder, Tag(OWN)] | Annotated[str, Tag(NAMED)],
    Discriminator(lambda value: NAMED if isinstance(value, str) else OWN),
]


class TextArchitecture(Section):
    """Sizes of a small Stable Diffusion 3."""

    family: Literal["sd3"] = Field(default="sd3", description="A small Stable Diffusion 3.")
    text_width: Width = Field(description="Width of the text encoders.")
    text_layers: Layers = Field(default=2, description="Layers of the text encoders.")
    vocabulary: Annotated[int, Field(gt=0, le=2**20)] = Field(description="Tokens of the vocabulary.")
    text_tokens: Width = Field(description="Tokens of a prompt.")
    layers: Layers = Field(description="Layers of the transformer.")
    heads: Width = Field(description="Attention heads.")
    head_width: Width = Field(description="Width of a head.")
    patch_size: Width = Field(default=2, description="Latent positions a side of a token.")
    max_grid: Pixels = Field(description="Side of the position table, in tokens.")


class ClassArchitecture(Section):
    """Sizes of a LightningDiT."""

    family: Literal["lightningdit"] = Field(description="A LightningDiT.")
    hidden_size: Width = Field(description="Width.")
    depth: Layers = Field(description="Layers.")
    num_heads: Width = Field(description="Attention heads.")
    patch_size: Width = Field(default=1, description="Latent positions a side of a token.")
    num_classes: Annotated[int, Field(gt=0, le=2**24)] = Field(description="Classes.")
    use_qknorm: bool = Field(default=True, description="Normalise queries and keys.")


class EmbedderAlignment(Optim):
    """DC-Gen's first step: the new patch embedder learns the pretrained model's tokens."""

    ema_decay: Fraction = Field(default=0.0, description="Decay of the average of the weights; DC-Gen keeps none.")


class HeadAlignment(FlowOptim):
    """DC-Gen's second step: patch embedder and head by flow matching, all between them frozen."""

    ema_decay: Fraction = Field(default=0.0, description="Decay of the average of the weights; DC-Gen keeps none.")


class Alignment(Section):
    """DC-Gen (arXiv 2509.25180), which moves `init` into the latents of another autoencoder."""

    base_resolution: Pixels = Field(
        description="Pixels at which the pretrained model cuts an image into as many tokens as the new one."
    )
    embedder: EmbedderAlignment = Field(description="Training of the patch embedder.")
    head: HeadAlignment = Field(description="Training of patch embedder and head.")


class BaseRecipe(Section):
    """Recipe of `davae train-base`: a base model on plain latents, from scratch or from `init`."""

    kind: Literal["base"] = Field(default="base", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    resolution: Pixels = Field(description="Side of the images in pixels.")
    autoencoder: AutoencoderChoice = Field(
        description="Sizes of one to train in `vae`, or a pretrained one: a folder, an embedded model or a hub id."
    )
    architecture: Annotated[TextArchitecture | ClassArchitecture, Field(discriminator="family")] = Field(
        description="Sizes of the transformer."
    )
    init: str | None = Field(
        default=None, description="LightningDiT to start from: folder, embedded model or hub id."
    )
    data: Data = Field(default=Data(), description="Images.")
    vae: Reconstruction | None = Field(
        default=None, description="Training of the autoencoder, where `autoencoder` gives sizes."
    )
    align: Alignment | None = Field(
        default=None, description="DC-Gen's two steps before `dit`, where `init` was trained on other latents."
    )
    dit: FlowOptim = Field(description="Training of the transformer.")
    cache: Cache = Field(default=Cache(), description="Latent cache.")
    sampling: Sampling = Field(default=Sampling(), description="Images that the run draws.")
    run: Run = Field(default=Run(), description="Settings of the whole run.")

    @property
    def trainings(self) -> dict[str, Optim]:
        """Settings of each training by its path in the recipe, in order."""
        vae: dict[str, Optim] = {} if self.vae is None else {"vae": self.vae}
        align = {} if self.align is None else {"align.embedder": self.align.embedder, "align.head": self.align.head}
        return {**vae, **align, "dit": self.dit}

    @model_validator(mode="after")
    def _can_start(self) -> BaseRecipe:
        if self.init is not None and not isinstance(self.architecture, ClassArchitecture):
            raise ValueError("init and align need a class-conditional model; set architecture.family to lightningdit")
        if self.align is None:
            return self
        if self.init is None:
            raise ValueError("align needs init, the pretrained model that is moved to the autoencoder's latents")
        if self.cache.shards is not None:
            raise ValueError("align encodes every image with both autoencoders; leave out cache.shards")
        if self.resolution % self.align.base_resolution:
            raise ValueError(
                f"align.base_resolution is {self.align.base_resolution}, resolution {self.resolution} is not a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> BaseRecipe:
        if isinstance(self.autoencoder, str):
            if self.vae is not None:
                raise ValueError(
                    f"the autoencoder is a pretrained one ({self.autoencoder}); leave out the section vae"
                )
            return self
        if self.vae is None:
            raise ValueError("the section vae, which trains the autoencoder, is missing")
        self.vae.check_discriminator("vae", self.resolution)
        if self.autoencoder.family == "dc" and self.vae.lambda_kl:
            raise ValueError(
                f"vae.lambda_kl is {self.vae.lambda_kl:g}, and a dc autoencoder is deterministic, without a KL term; "
                "set it to 0"
            )
        factor = 2 ** (len(self.autoencoder.channels) - 1)
        step = factor * self.architecture.patch_size
        if self.resolution % step:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {step} "
                f"(autoencoder factor {factor} x patch {self.architecture.patch_size})"
            )
        return self
