"""Sections of the trainings: their optimizers, losses and options."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from davae.recipes.fields import Batch, Fraction, NonNegativeInt, Pixels, PositiveInt, Section, Seed, Width
from davae.recipes.images import Data

POLISH = "stage1.polish"  # the training's name: its path in a recipe


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

    def check_discriminator(self, name: str, side: int) -> None:
        """Refuse more layers of the discriminator than squares of a side in pixels can pass.

        Raises:
            ValueError: in one line that begins with the section's name.
        """
        least = 3 * 2**self.gan_layers  # layers that halve, and two that take a pixel each
        if self.lambda_adv and self.max_steps >= self.gan_start and side < least:
            most = max(int(math.log2(max(side, 3) / 3)), 1)
            raise ValueError(
                f"{name}.gan_layers: {self.gan_layers} layers need {least} pixels, and this training sees {side}; use "
                f"{most}, or larger squares"
            )


class Polish(Section):
    """The decoder alone, on noised latents, after stage 1 and the cache (`davae.tasks.polish`).

    What it does not set is as in stage 1, losses and images included.
    """

    max_steps: PositiveInt = Field(description="Optimizer steps.")
    noise: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        default=0.4,
        description="tau: largest deviation of the noise on latents, in units of a channel's own. Its strength is "
        "uniform below that. RAE (arXiv 2510.11690) trains its decoder so.",
    )
    detail_noise: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="Largest share of z_d that noise takes the place of, at the same variance; uniform below that. The "
        "decoder then draws what z holds even where z_d is wrong.",
    )
    batch_size: Batch | None = Field(default=None, description="Images of one batch. Without it: as in stage 1.")
    crop: Pixels | None = Field(
        default=None, description="Side of the squares. Without it: as in stage 1; the resolution is all of an image."
    )
    lr: PositiveFloat | None = Field(default=None, description="Learning rate. Without it: as in stage 1.")
    lr_schedule: Literal["constant", "linear", "cosine"] | None = Field(
        default=None, description="Course of the learning rate. Without it: as in stage 1."
    )
    lr_warmup_steps: NonNegativeInt = Field(default=0, description="Steps over which the learning rate rises from 0.")
    lambda_adv: NonNegativeFloat | None = Field(
        default=None, description="Weight of the adversarial loss. Without it: as in stage 1."
    )
    gan_lr: PositiveFloat | None = Field(
        default=None, description="Learning rate of the discriminator. Without it: as in stage 1."
    )
    gan_start: NonNegativeInt = Field(
        default=0, description="Step of this training from which a new discriminator takes part."
    )


class DitAlignment(Section):
    """Alignment inside the frozen transformer (GRACE, Eq. 7-10)."""

    weight: NonNegativeFloat = Field(
        default=1.0, description="Weight of the loss, relative to that of equal gradient norms; 0 is without it."
    )
    weighting: Literal["adaptive", "constant"] = Field(
        default="adaptive",
        description="`adaptive` rescales it at each step by a ratio of gradient norms (GRACE, Eq. 10).",
    )
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.25, description="Share of the blocks that is compared, from the first on."
    )
    rank: Width = Field(default=16, description="Width between the two layers of a block's projection.")
    lr: PositiveFloat = Field(default=1e-4, description="Learning rate of the projections and the detail's embedder.")


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
    dit_alignment: DitAlignment | None = Field(
        default=None, description="Align features of the frozen transformer as well. Without it: z and z_d alone."
    )
    polish: Polish | None = Field(
        default=None,
        description="Train the decoder further, on noised latents, so that it forgives small errors of stage 2. "
        "May be added to a run that exists. Without it: off.",
    )

    @property
    def polishing(self) -> Stage1:
        """Settings of the polish: stage 1's, with the values that `polish` sets."""
        assert self.polish is not None
        own = self.polish.model_dump(exclude={"noise", "detail_noise"}, exclude_none=True)
        return self.model_copy(update=own)

    @model_validator(mode="after")
    def _whole_images(self) -> Stage1:
        if self.dit_alignment is not None and self.crop is not None:
            raise ValueError("dit_alignment compares whole images, and crop cuts squares; leave one of them out")
        return self


class Lora(Section):
    rank: Width = Field(default=256, description="Rank of LoRA.")
    alpha: PositiveFloat | None = Field(default=None, description="Scale of LoRA. Without it: equal to the rank.")
    extra_targets: tuple[str, ...] = Field(
        default=(), description="Ends of names of further layers to adapt, as norm1.linear in the authors' SD3 code."
    )
    train_norms: bool = Field(
        default=False, description="Train norms and modulation (adaLN) layers in full next to LoRA."
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
    detail_offset: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="Above 0 the detail has a time of its own (GRACE, Eq. 11-13), and the base is this far ahead in "
        "sampling; 0.15 in GRACE. LightningDiT alone.",
    )
    detail_offset_range: tuple[Fraction, Fraction] = Field(
        default=(0.0, 0.6), description="Least and greatest offset of a training step with detail_offset; GRACE's."
    )
    detail_residual: bool = Field(
        default=False,
        description="Learn the part of the detail that the base latent does not predict linearly, by a fit to the cache.",
    )
    clean_base: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        default=0.0, description="Share of samples with a clean base latent, for `davae upscale`."
    )
    hold_base: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="Share of the pretrained model's prediction in the target of the base, so that it forgets less; with 1 "
        "the images train the detail alone. Costs a pass without gradients and a whole frozen transformer on each device. "
        "Validation compares with the images.",
    )
    linear_skip: bool = Field(
        default=False,
        description="Add what a linear Gaussian model predicts of the detail, fitted to the cache, to the head's output. "
        "LightningDiT only.",
    )
    detail_prediction: Literal["base", "x0"] = Field(
        default="base",
        description="Prediction of the head's detail rows: the `base`'s, or `x0` under a velocity loss. LightningDiT only.",
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
        if self.hold_base and self.new_weights == "random":
            raise ValueError("hold_base needs the pretrained base of new_weights: zero; leave one of them out")
        if self.min_snr_gamma is not None and self.x0_ratio_max is not None:
            raise ValueError("min_snr_gamma and x0_ratio_max are two weights of the same loss; leave one of them out")
        return self

    @model_validator(mode="after")
    def _offset_fits(self) -> Stage2:
        low, high = self.detail_offset_range
        if not self.detail_offset:
            if self.detail_offset_range != Stage2.model_fields["detail_offset_range"].default:
                raise ValueError(
                    "detail_offset_range without detail_offset has no effect; set detail_offset, or leave it out"
                )
        elif not low <= self.detail_offset <= high:
            raise ValueError(
                f"detail_offset is {self.detail_offset}, outside detail_offset_range [{low}, {high}]: the model would be "
                "sampled at an offset that it never saw; widen the range"
            )
        elif self.detail_scale != 1.0:
            raise ValueError("detail_offset and detail_scale both put the base ahead; leave one of them out")
        return self
