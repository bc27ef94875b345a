"""Plain implementations of both stages, step by step from the paper's text.

`davae bench stage1` and `stage2` compare the trainer with them.

Nothing is kept from one line to the next: pictures and prompts are encoded within the step, every adaptive weight has
backward passes of its own, the discriminator's turn runs the autoencoder again, attention is a softmax written out, optimizer
and average are loops. Losses are the same as the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.latent import LatentLayout
from davae.recipes.sections import Optim, Stage1, Stage2
from davae.train.random import SampleRandom


class PlainOptimizer:
    """AdamW and a moving average, one parameter after the other."""

    def __init__(self, parameters: list[nn.Parameter], settings: Optim, lr: float):
        self.parameters, self.settings = parameters, settings
        self.adam = torch.optim.AdamW(
            parameters, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay, foreach=False, fused=False
        )
        self.average = [p.detach().clone() for p in parameters]

    def step(self, loss: Tensor, number: int, lr: float, clip: bool = True) -> None:
        """Run a backward pass, clip, update and average.

        Args:
            number: of the step, from 0.
        """
        self.adam.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm, foreach=False)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        decay = min(self.settings.ema_decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)


def gradient_norm(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0].norm()


class PlainStage1:
    """Eq. 3-6 on pictures, with the GAN and adaptive weights."""

    def __init__(self, settings: Stage1, vae: Any, perceptual: nn.Module, discriminator: nn.Module):
        self.settings, self.vae, self.perceptual, self.discriminator = settings, vae, perceptual, discriminator
        parameters = [p for p in vae.parameters() if p.requires_grad]
        self.autoencoder = PlainOptimizer(parameters, settings, settings.lr)
        self.critic = PlainOptimizer(list(discriminator.parameters()), settings, settings.gan_lr)

    def reconstruct(self, images: Tensor, draws: SampleRandom) -> tuple[Tensor, Any]:
        raw = self.vae.encode_raw(images)
        noise = draws.normal(*raw.mean.shape[1:]).to(raw.mean.device)
        z_d = raw.mean + (0.5 * raw.logvar).exp() * noise
        return self.vae.decode_raw(self.vae.layout.join(raw.z, z_d)), raw

    def step(self, images: Tensor, number: int, lr: float, afresh: Callable[[], SampleRandom]) -> float:
        """Train the autoencoder and then the discriminator on one batch.

        Args:
            afresh: returns the step's random numbers from their start.
        """
        s, align_by = self.settings, self.vae.layout.group_size
        reconstruction, raw = self.reconstruct(images, afresh())
        pixel = s.lambda_lpips * self.perceptual(reconstruction, images).mean()
        pixel = pixel + s.lambda_l1 * (reconstruction - images).abs().mean()
        kl = 0.5 * (raw.mean**2 + raw.logvar.exp() - 1 - raw.logvar).flatten(1).sum(1).mean()
        grouped = raw.mean.unflatten(1, (-1, align_by)).mean(2)
        align = ((grouped - raw.z.detach()) ** 2).mean()
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(reconstruction).mean()
        last = self.vae.last_decoder_weight
        gan = gradient_norm(pixel, last) / (gradient_norm(adversarial, last) + 1e-6)
        last = self.vae.last_encoder_weight
        pull = gradient_norm(pixel, last) / (gradient_norm(align, last) + 1e-6)
        total = pixel + s.lambda_kl * kl
        total = total + s.lambda_adv * gan.clamp(max=1e4).detach() * adversarial
        total = total + s.lambda_align * pull.clamp(max=1e4).detach() * align

        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            fake, _ = self.reconstruct(images, afresh())
        real_score, fake_score = self.discriminator(images), self.discriminator(fake)
        critic = 0.5 * (F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean())

        self.autoencoder.step(total, number, lr)
        self.critic.step(critic, number, lr * s.gan_lr / s.lr, clip=False)
        return float(total.detach())


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, written out, for (B,H,L,d) each.

    `scaled_dot_product_attention` computes the same.
    """
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))  # (B,H,L,S)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


@contextmanager
def explicit_attention() -> Iterator[None]:
    """Within this context every model's attention is `softmax_attention`."""
    fast = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = softmax_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fast


class PlainStage2:
    """Eq. 12-13 on pictures and prompts: both are encoded in every step.

    Args:
        predict: (transformer, x_t, t, conditions) -> velocity; embeds the conditions itself.
        draw: (batch, draws) -> (conditions, t, noise), as the trainer draws them.
    """

    def __init__(
        self, settings: Stage2, layout: LatentLayout, vae: Any, transformer: nn.Module, predict: Any, draw: Any
    ):
        self.settings, self.layout, self.vae, self.transformer = settings, layout, vae, transformer
        self.predict, self.draw = predict, draw
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        self.optimizer = PlainOptimizer(parameters, settings, settings.lr)

    def step(self, images: Tensor, captions: Sequence[str], number: int, lr: float, draws: SampleRandom) -> float:
        s, c, d = self.settings, self.layout.base_channels, self.layout.detail_channels
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.mode()  # (B,C+D,h,w)
        conditions, t, noise = self.draw(latents, list(captions), draws)
        along = t.view(-1, 1, 1, 1)
        with explicit_attention():
            prediction = self.predict(self.transformer, (1 - along) * latents + along * noise, t, conditions)
            base, detail = self.layout.split((prediction - (noise - latents)) ** 2)
            w = 1.0 if number >= s.warmup_steps else (1 - math.cos(math.pi * number / s.warmup_steps)) / 2
            loss = (c * base.mean() + w * d * detail.mean()) / (c + w * d)
            self.optimizer.step(loss, number, lr)
        return float(loss.detach())
