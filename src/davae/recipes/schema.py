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

    data: Data


class Autoencoder(Section):
    """Sizes of a small autoencoder, trained from scratch: an AutoencoderKL, or a deep-compression AutoencoderDC."""

    family: Literal["kl", "dc"] = "kl"  # dc is deterministic: no KL term
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=10)]
    layers: Layers = 1
    norm_groups: Width = 8  # kl alone
    latent_channels: Width

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

    family: Literal["sd3"] = "sd3"
    text_width: Width
    text_layers: Layers = 2
    vocabulary: Annotated[int, Field(gt=0, le=2**20)]
    text_tokens: Width
    layers: Layers
    heads: Width
    head_width: Width
    patch_size: Width = 2
    max_grid: Pixels  # side of the position table, in patches


class ClassArchitecture(Section):
    """Sizes of a LightningDiT."""

    family: Literal["lightningdit"]
    hidden_size: Width
    depth: Layers
    num_heads: Width
    patch_size: Width = 1
    num_classes: Annotated[int, Field(gt=0, le=2**24)]
    use_qknorm: bool = True


class EmbedderAlignment(Optim):
    """DC-Gen's first step: the new patch embedder learns the pretrained model's tokens of the same pictures."""

    ema_decay: Fraction = 0.0  # DC-Gen averages neither step


class HeadAlignment(FlowOptim):
    """DC-Gen's second step: patch embedder and head by flow matching, all between them frozen."""

    ema_decay: Fraction = 0.0


class Alignment(Section):
    """Moves the pretrained transformer of `init` into the latents of another autoencoder: DC-Gen (arXiv 2509.25180)."""

    base_resolution: Pixels  # pixels at which the pretrained model cuts a picture into as many tokens as the new one
    embedder: EmbedderAlignment
    head: HeadAlignment


class BaseRecipe(Section):
    """Train a base model on plain latents, from scratch or from a pretrained transformer: `davae train-base`."""

    kind: Literal["base"] = "base"
    name: RecipeName
    resolution: Pixels
    autoencoder: AutoencoderChoice  # trained by `vae`, or a pretrained one: a folder (a DetailVAE's too) or hub id
    architecture: Annotated[TextArchitecture | ClassArchitecture, Field(discriminator="family")]
    init: str | None = None  # a LightningDiT to start from: a pipeline's folder or hub id
    data: Data = Data()
    vae: Reconstruction | None = None
    align: Alignment | None = None  # before `dit`, where `init` was trained on another autoencoder's latents
    dit: FlowOptim
    cache: Cache = Cache()
    sampling: Sampling = Sampling()
    run: Run = Run()

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

    channels: Width = 64
    layers: Layers = 16
    lambda_lpips: NonNegativeFloat = 0.1
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = "lite0"
    perceptual_weights: str | None = None


class SuperResolutionRecipe(Section):
    """Train a super-resolution network on pictures alone: `davae train-sr`."""

    kind: Literal["super-resolution"] = "super-resolution"
    name: RecipeName
    resolution: Pixels  # pixels of the enlarged picture
    scale: Scale = 2
    data: Data = Data()
    network: SuperResolution
    run: Run = Run()

    @model_validator(mode="after")
    def _divides(self) -> SuperResolutionRecipe:
        if self.resolution % self.scale:
            raise ValueError(f"resolution {self.resolution} is not divisible by scale {self.scale}")
        return self


class Base(Section):
    """The pretrained model: a diffusers folder, a hub id, or `micro`, the embedded one; or how to train one first."""

    model: str | None = None
    train: BaseRecipe | None = None  # trained into the run folder before anything else
    resolution: Pixels  # pixels of I, the image whose token count is kept
    dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen weights: the transformer under LoRA, text encoders
    distilled: Literal["refuse", "train"] = (
        "refuse"  # a model that was distilled to a few steps; training undoes that
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

    kind: Literal["upgrade"] = "upgrade"
    name: RecipeName
    base: Base
    scale: Scale = 2
    detail_channels: Width
    init: str | None = None  # an upgrade to go on from, as `davae export` writes it, or an embedded one's name
    downsample: Literal["antialias", "bicubic"] = "antialias"
    data: Data = Data()
    stage1: Stage1
    cache: Cache = Cache()
    stage2: Stage2
    sampling: Sampling = Sampling()
    report: Report = Report()
    export: Export = Export()
    run: Run = Run()
    hardware: Hardware | None = None

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
