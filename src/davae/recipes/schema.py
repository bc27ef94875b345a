"""What a recipe may say. Importing this builds no model and loads no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    Tag,
    model_validator,
)

from davae.recipes.sections import (
    Cache,
    Data,
    Export,
    FlowOptim,
    Fraction,
    Hardware,
    Layers,
    Optim,
    Pixels,
    RecipeName,
    Reconstruction,
    Report,
    Run,
    Sampling,
    Scale,
    Section,
    Stage1,
    Stage2,
    Width,
)


class DataAlone(Section):
    """The section `data` without a recipe around it."""

    data: Data = Field(description="Images.")


class Autoencoder(Section):
    """Sizes of a small autoencoder, trained from scratch: an AutoencoderKL, or a deep-compression AutoencoderDC."""

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
        """What the shortcuts of a dc autoencoder can average: four positions into one, and channels into latents."""
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
    """DC-Gen's first step: the new patch embedder learns the pretrained model's tokens of the same pictures."""

    ema_decay: Fraction = Field(default=0.0, description="Decay of the average of the weights; DC-Gen keeps none.")


class HeadAlignment(FlowOptim):
    """DC-Gen's second step: patch embedder and head by flow matching, all between them frozen."""

    ema_decay: Fraction = Field(default=0.0, description="Decay of the average of the weights; DC-Gen keeps none.")


class Alignment(Section):
    """Moves the pretrained transformer of `init` into the latents of another autoencoder: DC-Gen (arXiv 2509.25180)."""

    base_resolution: Pixels = Field(
        description="Pixels at which the pretrained model cuts an image into as many tokens as the new one."
    )
    embedder: EmbedderAlignment = Field(description="Training of the patch embedder.")
    head: HeadAlignment = Field(description="Training of patch embedder and head.")


class BaseRecipe(Section):
    """Train a base model on plain latents, from scratch or from a pretrained transformer: `davae train-base`."""

    kind: Literal["base"] = Field(default="base", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    resolution: Pixels = Field(description="Side of the images in pixels.")
    autoencoder: AutoencoderChoice = Field(
        description="Sizes of one to train in `vae`, or a pretrained one: a folder or hub id."
    )
    architecture: Annotated[TextArchitecture | ClassArchitecture, Field(discriminator="family")] = Field(
        description="Sizes of the transformer."
    )
    init: str | None = Field(default=None, description="A LightningDiT to start from: a pipeline's folder or hub id.")
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

    @model_validator(mode="after")
    def _can_align(self) -> BaseRecipe:
        if self.align is None:
            return self
        if self.init is None:
            raise ValueError("align needs init, the pretrained model that is moved to the autoencoder's latents")
        if not isinstance(self.architecture, ClassArchitecture):
            raise ValueError("align moves class-conditional models; set architecture.family to lightningdit")
        if self.cache.shards is not None:
            raise ValueError("align encodes every picture with both autoencoders; leave out cache.shards")
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


class SuperResolution(Optim):
    """A small network that enlarges pictures, the baseline of Tab. S2."""

    channels: Width = Field(default=64, description="Channels of the network.")
    layers: Layers = Field(default=16, description="Layers of the network.")
    lambda_lpips: NonNegativeFloat = Field(default=0.1, description="Weight of the perceptual loss.")
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = Field(
        default="lite0", description="Network of the perceptual loss."
    )
    perceptual_weights: str | None = Field(
        default=None, description="A safetensors file with trunk and heads, where torchvision cannot download."
    )


class SuperResolutionRecipe(Section):
    """Train a super-resolution network on pictures alone: `davae train-sr`."""

    kind: Literal["super-resolution"] = Field(default="super-resolution", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    resolution: Pixels = Field(description="Side of the enlarged image in pixels.")
    scale: Scale = Field(default=2, description="How many times the side grows.")
    data: Data = Field(default=Data(), description="Images.")
    network: SuperResolution = Field(description="The network and its training.")
    run: Run = Field(default=Run(), description="Settings of the whole run.")

    @model_validator(mode="after")
    def _divides(self) -> SuperResolutionRecipe:
        if self.resolution % self.scale:
            raise ValueError(f"resolution {self.resolution} is not divisible by scale {self.scale}")
        return self


class Base(Section):
    """The pretrained model: a diffusers folder, a hub id, or `micro`, the embedded one; or how to train one first."""

    model: str | None = Field(
        default=None, description="A diffusers folder, a hub id, or `micro`, the embedded model."
    )
    train: BaseRecipe | None = Field(
        default=None, description="Recipe of a base to train first, into the run folder."
    )
    resolution: Pixels = Field(description="Side in pixels of the base image I, whose token count is kept.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of frozen weights: the transformer under LoRA, text encoders."
    )
    distilled: Literal["refuse", "train"] = Field(
        default="refuse",
        description="`train` accepts a model that was distilled to a few steps; training undoes the distillation.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Base:
        if (self.model is None) == (self.train is None):
            raise ValueError("give either model, a pretrained one, or train, the recipe of one to train first")
        if self.train is not None and self.train.resolution != self.resolution:
            raise ValueError(f"resolution is {self.resolution}, base.train.resolution {self.train.resolution}")
        return self

    @property
    def name(self) -> str:
        """What to call the base model."""
        return self.model if self.model is not None else cast(BaseRecipe, self.train).name


class Recipe(Section):
    """Upgrade a pretrained model: `davae upgrade`."""

    kind: Literal["upgrade"] = Field(default="upgrade", description="Kind of recipe.")
    name: RecipeName = Field(description="Name; the run folder is runs/NAME by default.")
    base: Base = Field(description="The pretrained model.")
    scale: Scale = Field(default=2, description="s: how many times the side grows, at the same token count.")
    detail_channels: Width = Field(description="D: channels of the detail latent, a multiple of the base's.")
    init: str | None = Field(
        default=None, description="An upgrade to go on from, as `davae export` writes it, or `micro-upgraded`."
    )
    downsample: Literal["antialias", "bicubic"] = Field(
        default="antialias",
        description="Filter that makes the base image. `bicubic` is the authors', without antialiasing.",
    )
    data: Data = Field(default=Data(), description="Images of both stages.")
    stage1: Stage1 = Field(description="The detail-aligned VAE.")
    cache: Cache = Field(default=Cache(), description="Latent cache between the stages.")
    stage2: Stage2 = Field(description="The warm-started transformer.")
    sampling: Sampling = Field(default=Sampling(), description="Images that the run draws.")
    report: Report = Field(default=Report(), description="The report.")
    export: Export = Field(default=Export(), description="The exported pipeline.")
    run: Run = Field(default=Run(), description="Settings of the whole run.")
    hardware: Hardware | None = Field(
        default=None, description="GPUs that a dry run plans for. Training takes those that it finds."
    )

    @model_validator(mode="before")
    @classmethod
    def _same_pictures(cls, values: Any) -> Any:
        """A base that is trained first sees the upgrade's pictures, unless it names its own."""
        train = values.get("base", {}).get("train") if isinstance(values.get("base"), dict) else None
        if isinstance(train, dict) and "data" not in train and "data" in values:
            values = {**values, "base": {**values["base"], "train": {**train, "data": values["data"]}}}
        return values

    @model_validator(mode="after")
    def _half_base_computes_in_half(self) -> Recipe:
        if self.base.dtype == "bfloat16" and self.run.mixed_precision != "bf16":
            raise ValueError(
                f"base.dtype is bfloat16 and run.mixed_precision {self.run.mixed_precision}; set run.mixed_precision to bf16"
            )
        return self

    @property
    def resolution(self) -> int:
        """Pixels of I_hr."""
        return self.base.resolution * self.scale

    @property
    def stage1_data(self) -> Data:
        """Images of stage 1."""
        return self.stage1.data or self.data

    @property
    def stage2_data(self) -> Data:
        """Images of the latent cache and stage 2."""
        return self.stage2.data or self.data

    @property
    def stage1_pixels(self) -> int:
        """Side of what a step of stage 1 sees of a square picture."""
        return min(self.resolution, self.stage1.crop or self.resolution)
