"""Sections that recipes of every kind consist of, importable without torch."""

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
    """Aspect ratios next to the square, at its token count (`davae.data.buckets`)."""

    max_ratio: Annotated[float, Field(ge=1.0)] = Field(
        default=4.0, description="Longest over shortest side of a bucket."
    )
    tokens: Literal["exact", "at_most"] = Field(
        default="exact",
        description="`exact`: buckets of the square's token count. `at_most`: 95 to 100 % "
        "of it, with many more ratios.",
    )


class Data(Section):
    """Source and preparation of images (`davae.data.sources`, docs/data.md)."""

    source: Name = Field(
        default="openmoji",
        description="`openmoji`, a folder, shards or parquet files (also by URL), or a Hugging Face dataset id.",
    )
    holdout: Fraction = Field(
        default=0.1,
        description="Share of images kept out of training, chosen by a hash of each name. "
        "With 0 the report shows training images.",
    )
    limit: PositiveInt | None = Field(default=None, description="Images to use at most, spread over the whole set.")
    flip: bool = Field(default=False, description="Mirror images at random.")
    crop: Literal["center", "random"] = Field(
        default="center", description="Part that is kept of an image of another aspect ratio."
    )
    buckets: Buckets | None = Field(
        default=None, description="Aspect ratios next to the square. Without it every image is cut to a square."
    )
    enlarge: bool = Field(
        default=False,
        description="Prepare images as ADM does, which enlarges small ones. Otherwise small images are left out.",
    )
    background: str = Field(default="white", description="Colour behind transparent pixels.")
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = Field(
        default=89_478_485, description="Refuse images with more pixels."
    )
    float_pixels: Literal["refuse", "unit"] = Field(
        default="refuse", description="`unit` reads floats as 0 (black) to 1 (white)."
    )
    caption_key: Name | None = Field(
        default=None,
        description="Key of the `.json` next to an image that holds the caption. Without "
        "it: the `.txt`, then `text`, `caption` or `prompt`.",
    )
    caption_weights: dict[str, PositiveFloat] = Field(
        default={},
        description="Several captions and how often each is drawn: keys of the `.json` "
        "(`txt` is the `.txt`), or columns.",
    )
    label_key: Name | None = Field(default=None, description="Key of the `.json` with the class number.")
    image_column: Name = Field(default="image", description="Column of a table that holds images.")
    caption_column: Name | None = Field(
        default=None, description="Column of a table that holds captions. Without it: text, caption or prompt."
    )
    label_column: Name | None = Field(default=None, description="Column of a table that holds class numbers.")
    split: Name = Field(default="train", description="Split of a table, or of train/, val/, test/ in a folder.")
    config: Name | None = Field(default=None, description="Configuration of a Hugging Face dataset.")
    require_captions: bool = Field(
        default=True, description="Stop a text-to-image run whose captions are mostly empty or equal."
    )
    streaming: bool = Field(default=False, description="Copy `limit` images instead of the whole dataset.")
    num_workers: Workers | None = Field(
        default=None, description="Processes that read images. Without it: chosen from the machine's cores."
    )

    @model_validator(mode="after")
    def _options_fit(self) -> Data:
        if self.caption_weights and (self.caption_key or self.caption_column):
            raise ValueError("give caption_weights, or one caption_key or caption_column, not both")
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs limit: how many pictures to take from the stream")
        return self


class Optim(Section):
    """AdamW with its schedule, for one network."""

    max_steps: PositiveInt = Field(description="Optimizer steps.")
    batch_size: Batch = Field(description="Images of one batch, over all processes; each takes an equal share.")
    accumulation: Batch = Field(
        default=1,
        description="Batches of one optimizer step. A step trains on batch_size x "
        "accumulation images: raising it costs time, not memory.",
    )
    lr: PositiveFloat = Field(default=1e-4, description="Learning rate.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="AdamW's betas.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW's weight decay.")
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit"] = Field(
        default="adamw",
        description="`adamw-fused` is faster on a GPU. `adamw-8bit` takes less memory and needs bitsandbytes.",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Course of the learning rate after its warm-up."
    )
    lr_cycles: PositiveInt = Field(default=1, description="How often a falling schedule starts again.")
    lr_warmup_steps: NonNegativeInt = Field(
        default=0,
        description="Steps over which the learning rate rises from 0. Not "
        "stage2.warmup_steps, which fades in the detail loss.",
    )
    max_grad_norm: PositiveFloat = Field(default=1.0, description="Clip gradients to this norm.")
    ema_decay: Fraction = Field(
        default=0.999, description="Decay of the average of the weights that is exported. 0 keeps no average."
    )
    seed: Seed | None = Field(default=None, description="Seed of this training alone. Without it: run.seed.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass: less memory, about a third more time.",
    )


class Reconstruction(Optim):
    """Eq. 5: L_rec and the discriminator that L_adv needs."""

    lambda_lpips: NonNegativeFloat = Field(default=1.0, description="Weight of the perceptual loss (Eq. 5).")
    lambda_l1: NonNegativeFloat = Field(default=1.0, description="Weight of the L1 loss (Eq. 5).")
    lambda_adv: NonNegativeFloat = Field(default=0.1, description="Weight of the adversarial loss (Eq. 5).")
    lambda_kl: NonNegativeFloat = Field(default=1e-6, description="Weight of the KL loss (Eq. 5).")
    perceptual: Literal["lpips-vgg", "lpips-alex", "lite0"] = Field(
        default="lpips-vgg",
        description="Network of the perceptual loss. `lite0` needs no download and is not "
        "LPIPS; metrics keep the key `lpips` for it.",
    )
    perceptual_weights: str | None = Field(
        default=None, description="A safetensors file with trunk and heads, where torchvision cannot download."
    )
    gan_start: NonNegativeInt = Field(default=5001, description="Step from which the discriminator takes part.")
    gan_lr: PositiveFloat = Field(default=1e-4, description="Learning rate of the discriminator.")
    gan_channels: Width = Field(default=64, description="Channels of the discriminator's first layer.")
    gan_layers: Annotated[int, Field(gt=0, le=16)] = Field(default=3, description="Layers of the discriminator.")


class Stage1(Reconstruction):
    """The detail-aligned VAE (Sec. 3.1)."""

    lambda_align: NonNegativeFloat = Field(default=0.5, description="Weight of the alignment loss (Eq. 6).")
    alignment: Literal["constant", "adaptive"] = Field(
        default="constant",
        description="`adaptive` rescales the weight at each step by a ratio of gradient "
        "norms, as the authors' code does.",
    )
    detail_dropout: Fraction = Field(default=0.0, description="Share of samples whose detail latent is set to zero.")
    data: Data | None = Field(default=None, description="Images of stage 1 alone. Without it: the recipe's data.")
    start: Literal["enlarged", "unfolded"] = Field(
        default="enlarged", description="Start of the new layers; see DetailVAE.from_base."
    )
    crop: Pixels | None = Field(
        default=None,
        description="Train on a random square of this many pixels of each image. Without it: on all of it.",
    )


class Lora(Section):
    rank: Width = Field(default=256, description="Rank of LoRA.")
    alpha: PositiveFloat | None = Field(default=None, description="Scale of LoRA. Without it: equal to the rank.")
    extra_targets: tuple[str, ...] = Field(
        default=(), description="Ends of names of further layers to adapt, as norm1.linear in the authors' SD3 code."
    )


class FlowOptim(Optim):
    """Flow matching for a transformer. Models trained by DDPM do not use timestep_*."""

    caption_dropout: Fraction = Field(
        default=0.1, description="Share of captions or class labels that are replaced by none, for guidance."
    )
    cosine_loss: Literal["off", "all", "faded"] = Field(
        default="off", description="Loss on the direction of the velocity. `faded` weights its detail part by w(n)."
    )
    timestep_mean: float = Field(default=0.0, description="Mean of the logit-normal timesteps.")
    timestep_std: PositiveFloat = Field(default=1.0, description="Deviation of the logit-normal timesteps.")
    timestep_shift: PositiveFloat = Field(default=1.0, description="Shift of the timesteps towards noise.")


class Stage2(FlowOptim):
    """The warm-started transformer (Sec. 3.2)."""

    warmup_steps: NonNegativeInt = Field(
        default=0,
        description="N_warm of Eq. 12: steps over which the weight w(n) of the detail loss "
        "rises from 0 to 1. Not the learning rate's warm-up, which is lr_warmup_steps.",
    )
    lora: Lora | None = Field(
        default=None, description="Train LoRA and the whole patch embedder and head. Without it: every weight."
    )
    data: Data | None = Field(
        default=None, description="Images of the cache and stage 2 alone. Without it: the recipe's data."
    )
    new_weights: Literal["zero", "random"] = Field(
        default="zero", description="Start of P' and O'. `random` is the ablation of Fig. 4."
    )
    new_weight_lr_multiplier: PositiveFloat = Field(
        default=1.0, description="Learning rate of P' and O' relative to the rest."
    )
    min_snr_gamma: PositiveFloat | None = Field(
        default=None, description="Min-SNR weighting (arXiv 2303.09556); 5 in its paper."
    )
    x0_ratio_max: PositiveFloat | None = Field(
        default=None, description="The authors' SD3 weighting: x0 loss times min((1-t)/t, this); theirs is 5."
    )
    embedded_guidance: PositiveFloat = Field(
        default=1.0,
        description="Guidance input of guidance-distilled models (FLUX.1 dev, FLUX.2 dev) during training.",
    )
    detail_scale: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="Below 1 the detail is scaled, and so noisier than the base, which settles first; 0.5 is like GRACE.",
    )
    clean_base: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        default=0.0, description="Share of samples with a clean base latent, for `davae upscale`."
    )
    validate_every: NonNegativeInt = Field(
        default=0, description="Steps between losses on held-out images with fixed noise; 0 for never."
    )
    validate_pictures: PositiveInt = Field(default=64, description="Images of a validation.")

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

    batch_size: Batch = Field(default=16, description="Images encoded at a time, at most.")
    variants: Batch = Field(default=1, description="Augmented draws (crop, flip, background, caption) of an image.")
    dtype: Literal["float32", "float16"] = Field(default="float16", description="Precision of the cached latents.")
    shards: str | None = Field(
        default=None, description="LightningDiT's latent shards to train on, instead of encoding images."
    )
    text: Literal["stored", "step"] = Field(
        default="stored", description="Prompt embeddings: `stored` on disk once, or computed again in every `step`."
    )


class Sampling(Section):
    steps: SamplingSteps = Field(default=30, description="Sampling steps of the report and of progress images.")
    guidance_scale: NonNegativeFloat = Field(default=2.5, description="Guidance scale of the same.")
    prompts: tuple[str, ...] = Field(
        default=(), description="Prompts of the same. Without them: captions of training images."
    )
    seed: Seed = Field(default=0, description="Seed of their noise.")


class Report(Section):
    holdout_pictures: PositiveInt = Field(default=64, description="Images in the reconstruction table.")
    timing_repeats: PositiveInt = Field(default=5, description="Repeats of each timing; the median counts.")
    batch_size: PositiveInt | None = Field(
        default=None,
        description="Images at a time in report and validation. Without it: what the memory plan allows.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="Precision of the report's images. Without it: the run's. May change on a run that exists.",
    )


class Export(Section):
    """The run's `pipeline/`."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of the run's pipeline/."
    )
    timing_repeats: SamplingSteps = Field(default=5, description="Unused; report.timing_repeats counts.")


class Run(Section):
    seed: Seed = Field(default=0, description="Seed of everything that has none of its own.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Precision of the computation.")
    log_every: PositiveInt = Field(default=10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: PositiveInt = Field(default=500, description="Steps between checkpoints.")
    keep_checkpoints: PositiveInt = Field(
        default=2, description="Newest checkpoints that are kept; the best validated one is kept as well."
    )
    keep_every: NonNegativeInt = Field(
        default=0, description="Steps between checkpoints that are never dropped; 0 for none."
    )
    sample_every: NonNegativeInt = Field(default=0, description="Steps between grids in progress/; 0 for never.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="Experiment trackers to log to."
    )
    stop_signals: tuple[Literal["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"], ...] = Field(
        default=("SIGINT", "SIGTERM", "SIGUSR1"), description="Signals at which a run saves and stops."
    )
    ema_device: Literal["model", "cpu"] = Field(
        default="model", description="Where the average of the weights is kept. `cpu` saves memory of the GPU."
    )
    compile: Literal["off", "blocks"] = Field(
        default="off", description="`blocks` compiles each repeated block with torch.compile."
    )
    find_unused_parameters: bool = Field(default=False, description="DDP: for models that leave weights unused.")

    @field_validator("mixed_precision", "compile", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads an unquoted no or off as false."""
        return {"mixed_precision": "no", "compile": "off"}[str(info.field_name)] if value is False else value


class Hardware(Section):
    """GPUs that a recipe was written for, with which a dry run reckons, unlike training."""

    gpu: str = Field(description="Name of the GPU.")
    count: Batch = Field(default=1, description="Processes; each takes its share of the batch.")
    a_machine: PositiveInt = Field(default=8, description="GPUs of one machine.")
    host_gib: PositiveInt | None = Field(
        default=None, description="Main memory of one machine in GiB. Without it: not checked."
    )
    disk_gib: PositiveInt | None = Field(
        default=None, description="Space for the run folder in GiB. Without it: not checked."
    )

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"use one of {', '.join(GPUS)}")
        return gpu
