"""Parts that recipes of every kind are made of. Importing this builds no model and loads no torch."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from davae.recipes.hardware import GPUS

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# Upper bounds catch slips and hostile files before they take all memory; each is far above what any model takes.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Pixels = Annotated[int, Field(gt=0, le=16_384)]
Width = Annotated[int, Field(gt=0, le=65_536)]  # channels, heads, ranks
Layers = Annotated[int, Field(gt=0, le=1024)]
Batch = Annotated[int, Field(gt=0, le=65_536)]
SamplingSteps = Annotated[int, Field(gt=0, le=10_000)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Scale = Annotated[int, Field(ge=2, le=64)]
LARGEST = 1e30  # float32 still holds its square root times a large sum


def _plain_name(name: str) -> str:
    """Refuse a name that is more than one part of a path: run folders are called by it."""
    if not name or len(name) > 100 or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError("use a plain name of up to 100 letters without slashes; a run folder is called by it")
    return name


RecipeName = Annotated[str, AfterValidator(_plain_name)]


def _as_text(value: Any) -> Any:
    """Return the text of a number or date that YAML made of a name such as 2024 or 2024-05-01."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads it as {str(value).lower()}; put the name into quotes")
    return str(value) if isinstance(value, (int, date)) else value


Name = Annotated[str, BeforeValidator(_as_text)]  # of a file, folder or column


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _float32_holds_it(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and abs(number) > LARGEST:
                raise ValueError(f"use a number up to {LARGEST:g}")
        return value


class Buckets(Section):
    """Aspect ratios beside the square, at its token count; see `davae.data.buckets`."""

    max_ratio: Annotated[float, Field(ge=1.0)] = 4.0  # longer side over shorter side
    tokens: Literal["exact", "at_most"] = "exact"  # `at_most`: 95 to 100 % of the square's tokens, many more ratios


class Data(Section):
    """Where pictures come from; see `davae.data.open_source` and docs/data.md."""

    source: Name = (
        "openmoji"  # 'openmoji', a folder, shards or parquet files (also by URL), a Hugging Face dataset id
    )
    holdout: Fraction = 0.1  # share kept out of training, chosen by a hash of each picture's name
    limit: PositiveInt | None = None  # only this many images, spread over the whole set
    flip: bool = False
    crop: Literal["center", "random"] = "center"  # what stays of a picture of another aspect ratio
    buckets: Buckets | None = None  # None: every picture is cut to a square
    enlarge: bool = False  # prepare images as ADM does, which enlarges small ones; off: they are left out
    background: str = "white"  # what alpha is composited on
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = (
        89_478_485  # larger pictures are refused (Pillow's limits)
    )
    float_pixels: Literal["refuse", "unit"] = "refuse"  # unit: floats are 0 (black) to 1 (white)
    caption_key: Name | None = (
        None  # key of the `.json` beside a picture; without it the `.txt`, else its `text`, `caption` or `prompt`
    )
    caption_weights: dict[
        str, PositiveFloat
    ] = {}  # several captions: keys of the `.json` (`txt`: the `.txt`), or columns
    label_key: Name | None = None  # key of the `.json` with the class number
    image_column: Name = "image"  # tables only, as the next five
    caption_column: Name | None = None  # None: text, caption or prompt
    label_column: Name | None = None
    split: Name = "train"  # of a table; or of train/, val/, test/ side by side in a folder
    config: Name | None = None
    require_captions: bool = True  # a text-to-image run stops where most captions are empty or the same
    streaming: bool = False  # copy `limit` pictures, not the whole dataset
    num_workers: Workers | None = None  # processes that read images; None: chosen from the machine's cores

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
    batch_size: Batch  # of all processes together; each takes an equal share
    accumulation: Batch = 1  # batches a step
    lr: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit"] = "adamw"  # 8-bit needs bitsandbytes
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_cycles: PositiveInt = 1  # how often a falling schedule starts again
    lr_warmup_steps: NonNegativeInt = 0
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Fraction = 0.999  # 0 keeps no average
    seed: Seed | None = None  # of this training alone; None takes run.seed
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
    gan_channels: Width = 64
    gan_layers: Annotated[int, Field(gt=0, le=16)] = 3


class Stage1(Reconstruction):
    """The detail-aligned VAE (Sec. 3.1)."""

    lambda_align: NonNegativeFloat = 0.5
    alignment: Literal["constant", "adaptive"] = "constant"
    detail_dropout: Fraction = 0.0
    data: Data | None = None  # images of stage 1 alone; None: the recipe's data
    start: Literal["enlarged", "unfolded"] = "enlarged"  # of the new layers; see DetailVAE.from_base
    crop: Pixels | None = None  # train on a random square of so many pixels of each picture; None: on all of it


class Lora(Section):
    rank: Width = 256
    alpha: PositiveFloat | None = None  # None: equal to the rank
    extra_targets: tuple[
        str, ...
    ] = ()  # ends of names of further layers to adapt, as norm1.linear in the authors' SD3 code


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
    data: Data | None = None  # images of the cache and stage 2 alone; None: the recipe's data
    new_weights: Literal["zero", "random"] = "zero"  # P' and O' at the start; `random` is the ablation of Fig. 4
    new_weight_lr_multiplier: PositiveFloat = 1.0  # learning rate of P' and O' relative to the rest
    min_snr_gamma: PositiveFloat | None = (
        None  # min-SNR weighting (arXiv 2303.09556) for any objective; 5 in its paper
    )
    x0_ratio_max: PositiveFloat | None = (
        None  # the authors' SD3 weighting: x0 loss times min((1-t)/t, this); theirs is 5
    )
    embedded_guidance: PositiveFloat = (
        1.0  # the input of guidance-distilled models (FLUX.1 dev, FLUX.2 dev) in training
    )
    clean_base: Annotated[float, Field(ge=0.0, le=0.9)] = (
        0.0  # share of samples with a clean base, for `davae upscale`
    )
    validate_every: NonNegativeInt = 0  # steps between losses on held-out pictures with fixed noise; 0 never
    validate_pictures: PositiveInt = 64

    @model_validator(mode="after")
    def _fade_fits(self) -> Stage2:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps (N_warm) is {self.warmup_steps}, more than max_steps {self.max_steps}: the detail "
                "loss would never reach its full weight; lower warmup_steps or raise max_steps"
            )
        if self.min_snr_gamma is not None and self.x0_ratio_max is not None:
            raise ValueError("min_snr_gamma and x0_ratio_max are two weights of the same loss; leave one of them out")
        return self


class Cache(Section):
    """The latent cache between the stages."""

    batch_size: Batch = 16  # images encoded at a time, at most: fewer where the device's memory asks for it
    variants: Batch = 1  # augmented draws (crop, flip, background, caption) kept of every picture
    dtype: Literal["float32", "float16"] = "float16"
    shards: str | None = None  # LightningDiT's latent shards to train on, instead of encoding data.source
    text: Literal["stored", "step"] = "stored"  # prompt embeddings: written once, or computed again in every step


class Sampling(Section):
    steps: SamplingSteps = 30
    guidance_scale: NonNegativeFloat = 2.5
    prompts: tuple[str, ...] = ()
    seed: Seed = 0


class Report(Section):
    holdout_pictures: PositiveInt = 64  # held-out pictures in the reconstruction table
    timing_repeats: PositiveInt = 5
    batch_size: PositiveInt | None = (
        None  # images at a time in report and validation; None: what the memory plan allows
    )


class Export(Section):
    """The run's `pipeline/`."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    timing_repeats: SamplingSteps = 5


class Run(Section):
    seed: Seed = 0
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

    @field_validator("mixed_precision", "compile", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads an unquoted no or off as false."""
        return {"mixed_precision": "no", "compile": "off"}[str(info.field_name)] if value is False else value


class Hardware(Section):
    """The GPUs that a recipe was written for: what a dry run reckons with. Training takes whatever it is started on."""

    gpu: str
    count: Batch = 1  # processes; each takes its share of the batch
    a_machine: PositiveInt = 8  # GPUs of one machine
    host_gib: PositiveInt | None = None  # main memory of one machine; None: not checked
    disk_gib: PositiveInt | None = None  # space for the run folder; None: not checked

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"use one of {', '.join(GPUS)}")
        return gpu
