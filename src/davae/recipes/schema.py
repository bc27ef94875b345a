"""What a recipe may say. Importing this builds no model and loads no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from davae.recipes.hardware import GPUS

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Buckets(Section):
    """Aspect ratios beside the square, at its token count; see `davae.data.buckets`."""

    max_ratio: Annotated[float, Field(ge=1.0)] = 4.0  # longer side over shorter side
    tokens: Literal["exact", "at_most"] = "exact"  # `at_most`: 95 to 100 % of the square's tokens, many more ratios


class Data(Section):
    """Where pictures come from; see `davae.data.open_source` and docs/data.md."""

    source: str = "openmoji"  # 'openmoji', a folder, shards or parquet files (also by URL), a Hugging Face dataset id
    holdout: Fraction = 0.1  # share kept out of training, chosen by a hash of each picture's name
    limit: PositiveInt | None = None  # only the first so many pictures
    flip: bool = False
    crop: Literal["center", "random"] = "center"  # what stays of a picture of another aspect ratio
    buckets: Buckets | None = None  # None: every picture is cut to a square
    background: str = "white"  # what alpha is composited on
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = (
        89_478_485  # larger pictures are refused (Pillow's limits)
    )
    caption_key: str | None = None  # key of the `.json` beside a picture; without it the `.txt` is the caption
    caption_weights: dict[
        str, PositiveFloat
    ] = {}  # several captions: keys of the `.json` (`txt`: the `.txt`), or columns
    label_key: str | None = None  # key of the `.json` with the class number
    image_column: str = "image"  # tables only, as the next five
    caption_column: str | None = None  # None: text, caption or prompt
    label_column: str | None = None
    split: str = "train"
    config: str | None = None
    streaming: bool = False  # copy `limit` pictures, not the whole dataset
    num_workers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _options_fit(self) -> Data:
        if self.caption_weights and (self.caption_key or self.caption_column):
            raise ValueError("give caption_weights, or one caption_key or caption_column, not both")
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs limit: how many pictures to take from the stream")
        return self


class Optim(Section):
    """AdamW with its schedule, for one network."""

    max_steps: PositiveInt
    batch_size: PositiveInt  # of all processes together; each takes an equal share
    accumulation: PositiveInt = 1  # batches a step
    lr: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit"] = "adamw"  # 8-bit needs bitsandbytes
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_cycles: PositiveInt = 1  # how often a falling schedule starts again
    lr_warmup_steps: NonNegativeInt = 0
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Fraction = 0.999  # 0 keeps no average
    seed: int | None = None  # of this training alone; None takes run.seed
    gradient_checkpointing: bool = False


class Reconstruction(Optim):
    """Eq. 5: L_rec and the discriminator that L_adv needs."""

    lambda_lpips: NonNegativeFloat = 1.0
    lambda_l1: NonNegativeFloat = 1.0
    lambda_adv: NonNegativeFloat = 0.1
    lambda_kl: NonNegativeFloat = 1e-6
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = "lpips-vgg"
    perceptual_weights: str | None = None  # safetensors with trunk and heads, where torchvision cannot download
    gan_start: NonNegativeInt = 5001
    gan_lr: PositiveFloat = 1e-4
    gan_channels: PositiveInt = 64
    gan_layers: PositiveInt = 3


class Stage1(Reconstruction):
    """The detail-aligned VAE (Sec. 3.1)."""

    lambda_align: NonNegativeFloat = 0.5
    alignment: Literal["constant", "adaptive"] = "constant"
    detail_dropout: Fraction = 0.0
    start: Literal["enlarged", "unfolded"] = "enlarged"  # of the new layers; see DetailVAE.from_base
    crop: PositiveInt | None = None  # train on a random square of so many pixels of each picture; None: on all of it


class Lora(Section):
    rank: PositiveInt = 256
    alpha: PositiveFloat | None = None  # None: equal to the rank


class FlowOptim(Optim):
    """Flow matching for a transformer. A model trained by DDPM draws its timesteps uniformly: timestep_* are not for it."""

    caption_dropout: Fraction = 0.1  # share of captions, or of class labels, replaced by none, for guidance
    cosine_loss: Literal["off", "all", "faded"] = "off"  # direction of the velocity; `faded` weighs detail by w(n)
    timestep_mean: float = 0.0
    timestep_std: PositiveFloat = 1.0
    timestep_shift: PositiveFloat = 1.0


class Stage2(FlowOptim):
    """The warm-started transformer (Sec. 3.2)."""

    warmup_steps: NonNegativeInt = 0  # N_warm of Eq. 12
    lora: Lora | None = None  # None trains every parameter
    new_weights: Literal["zero", "random"] = "zero"  # P' and O' at the start; `random` is the ablation of Fig. 4
    new_weight_lr_multiplier: PositiveFloat = 1.0  # learning rate of P' and O' relative to the rest
    min_snr_gamma: PositiveFloat | None = None  # min-SNR weighting for any objective; 5 in the authors' SD3 config
    validate_every: NonNegativeInt = 0  # steps between losses on held-out pictures with fixed noise; 0 never
    validate_pictures: PositiveInt = 64

    @model_validator(mode="after")
    def _fade_fits(self) -> Stage2:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps (N_warm) is {self.warmup_steps}, more than max_steps {self.max_steps}: the detail "
                "loss would never reach its full weight; lower warmup_steps or raise max_steps"
            )
        return self


class Cache(Section):
    """The latent cache between the stages."""

    batch_size: PositiveInt = 16
    variants: PositiveInt = 1  # augmented draws (crop, flip, background, caption) kept of every picture
    dtype: Literal["float32", "float16"] = "float16"
    shards: str | None = None  # LightningDiT's latent shards to train on, instead of encoding data.source


class Sampling(Section):
    steps: PositiveInt = 30
    guidance_scale: NonNegativeFloat = 2.5
    prompts: tuple[str, ...] = ()
    seed: int = 0


class Report(Section):
    holdout_pictures: PositiveInt = 64  # held-out pictures in the reconstruction table
    timing_repeats: PositiveInt = 5


class Run(Section):
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2  # the newest ones; the best validated one is kept as well
    keep_every: NonNegativeInt = 0  # checkpoints of every so many steps are never dropped; 0 drops all
    sample_every: NonNegativeInt = 0  # steps between grids of pictures at a fixed seed, into progress/; 0 never
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    stop_signals: tuple[Literal["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"], ...] = ("SIGINT", "SIGTERM", "SIGUSR1")
    ema_device: Literal["model", "cpu"] = "model"
    compile: Literal["off", "blocks"] = "off"  # torch.compile on each repeated block
    find_unused_parameters: bool = False  # DDP: for models that leave weights unused in some steps


class Hardware(Section):
    """The GPUs that a recipe was written for: what a dry run reckons with. Training takes whatever it is started on."""

    gpu: str
    count: PositiveInt = 1  # processes; every one takes batch_size pictures a step

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"use one of {', '.join(GPUS)}")
        return gpu


class Autoencoder(Section):
    """Sizes of a small autoencoder, trained from scratch: an AutoencoderKL, or a deep-compression AutoencoderDC."""

    family: Literal["kl", "dc"] = "kl"  # dc is deterministic: no KL term
    channels: tuple[PositiveInt, ...]
    layers: PositiveInt = 1
    norm_groups: PositiveInt = 8  # kl alone
    latent_channels: PositiveInt

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
    text_width: PositiveInt
    text_layers: PositiveInt = 2
    vocabulary: PositiveInt
    text_tokens: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    head_width: PositiveInt
    patch_size: PositiveInt = 2
    max_grid: PositiveInt  # side of the position table, in patches


class ClassArchitecture(Section):
    """Sizes of a LightningDiT."""

    family: Literal["lightningdit"]
    hidden_size: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 1
    num_classes: PositiveInt
    use_qknorm: bool = True


class EmbedderAlignment(Optim):
    """DC-Gen's first step: the new patch embedder learns the pretrained model's tokens of the same pictures."""

    ema_decay: Fraction = 0.0  # DC-Gen averages neither step


class HeadAlignment(FlowOptim):
    """DC-Gen's second step: patch embedder and head by flow matching, all between them frozen."""

    ema_decay: Fraction = 0.0


class Alignment(Section):
    """Moves the pretrained transformer of `init` into the latents of another autoencoder: DC-Gen (arXiv 2509.25180)."""

    base_resolution: (
        PositiveInt  # pixels at which the pretrained model cuts a picture into as many tokens as the new one
    )
    embedder: EmbedderAlignment
    head: HeadAlignment


class BaseRecipe(Section):
    """Train a base model on plain latents, from scratch or from a pretrained transformer: `davae train-base`."""

    kind: Literal["base"] = "base"
    name: str
    resolution: PositiveInt
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

    channels: PositiveInt = 64
    layers: PositiveInt = 16
    lambda_lpips: NonNegativeFloat = 0.1
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = "lite0"
    perceptual_weights: str | None = None


class SuperResolutionRecipe(Section):
    """Train a super-resolution network on pictures alone: `davae train-sr`."""

    kind: Literal["super-resolution"] = "super-resolution"
    name: str
    resolution: PositiveInt  # pixels of the enlarged picture
    scale: Annotated[int, Field(ge=2)] = 2
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
    resolution: PositiveInt  # pixels of I, the image whose token count is kept

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
    name: str
    base: Base
    scale: Annotated[int, Field(ge=2)] = 2
    detail_channels: PositiveInt
    init: str | None = None  # an upgrade to go on from, as `davae export` writes it, or an embedded one's name
    downsample: Literal["antialias", "bicubic"] = "antialias"
    data: Data = Data()
    stage1: Stage1
    cache: Cache = Cache()
    stage2: Stage2
    sampling: Sampling = Sampling()
    report: Report = Report()
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

    @property
    def resolution(self) -> int:
        """Pixels of I_hr."""
        return self.base.resolution * self.scale

    @property
    def stage1_pixels(self) -> int:
        """Side of what a step of stage 1 sees of a square picture."""
        return min(self.resolution, self.stage1.crop or self.resolution)
