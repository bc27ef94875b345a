"""What a recipe may say. Importing this builds no model and loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where pictures come from; see `davae.data.open_source`."""

    source: str = "openmoji"  # 'openmoji', a folder, a .tar or shard pattern, a Hugging Face dataset id
    holdout: Fraction = 0.1  # share kept out of training, chosen by a hash of each picture's name
    flip: bool = False
    background: str = "white"  # what alpha is composited on
    image_column: str = "image"  # Hugging Face datasets only
    caption_column: str | None = None
    num_workers: NonNegativeInt = 0


class Optim(Section):
    """AdamW with its schedule, for one network."""

    max_steps: PositiveInt
    batch_size: PositiveInt
    accumulation: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_cycles: PositiveInt = 1  # restarts of the cosine
    lr_warmup_steps: NonNegativeInt = 0
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Fraction = 0.999  # 0 keeps no average
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


class Lora(Section):
    rank: PositiveInt = 256
    alpha: PositiveFloat | None = None  # None: equal to the rank


class FlowOptim(Optim):
    """Flow matching for a transformer."""

    caption_dropout: Fraction = 0.1
    timestep_mean: float = 0.0
    timestep_std: PositiveFloat = 1.0
    timestep_shift: PositiveFloat = 1.0


class Stage2(FlowOptim):
    """The warm-started transformer (Sec. 3.2)."""

    warmup_steps: NonNegativeInt = 0  # N_warm of Eq. 12
    lora: Lora | None = None  # None trains every parameter
    new_weight_lr_multiplier: PositiveFloat = 1.0  # learning rate of P' and O' relative to the rest

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
    variants: PositiveInt = 1  # augmented draws (flip, background, caption) kept of every picture
    dtype: Literal["float32", "float16"] = "float16"


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
    keep_checkpoints: PositiveInt = 2


class Base(Section):
    """The pretrained model: a diffusers folder, a hub id, or `micro`, the embedded one."""

    model: str
    resolution: PositiveInt  # pixels of I, the image whose token count is kept


class Recipe(Section):
    """Upgrade a pretrained model: `davae upgrade`."""

    kind: Literal["upgrade"] = "upgrade"
    name: str
    base: Base
    scale: Annotated[int, Field(ge=2)] = 2
    detail_channels: PositiveInt
    downsample: Literal["antialias", "bicubic"] = "antialias"
    data: Data = Data()
    stage1: Stage1
    cache: Cache = Cache()
    stage2: Stage2
    sampling: Sampling = Sampling()
    report: Report = Report()
    run: Run = Run()

    @property
    def resolution(self) -> int:
        """Pixels of I_hr."""
        return self.base.resolution * self.scale


class Architecture(Section):
    """Sizes of a small Stable Diffusion 3."""

    vae_channels: tuple[PositiveInt, ...]
    vae_layers: PositiveInt = 1
    norm_groups: PositiveInt = 8
    latent_channels: PositiveInt
    text_width: PositiveInt
    text_layers: PositiveInt = 2
    vocabulary: PositiveInt
    text_tokens: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    head_width: PositiveInt
    patch_size: PositiveInt = 2
    max_grid: PositiveInt  # side of the position table, in patches


class BaseRecipe(Section):
    """Pretrain a small base model from scratch: `davae train-base`."""

    kind: Literal["base"] = "base"
    name: str
    resolution: PositiveInt
    architecture: Architecture
    data: Data = Data()
    vae: Reconstruction
    dit: FlowOptim
    cache: Cache = Cache()
    sampling: Sampling = Sampling()
    run: Run = Run()

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.architecture.vae_channels) - 1)

    @model_validator(mode="after")
    def _sizes_divide(self) -> BaseRecipe:
        step = self.vae_factor * self.architecture.patch_size
        if self.resolution % step:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {step} "
                f"(autoencoder factor {self.vae_factor} x patch {self.architecture.patch_size})"
            )
        return self
