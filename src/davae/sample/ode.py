"""Sampling of velocity models by an ODE from noise (t = 0) to data (t = 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from davae.backbones.detail_time import OFFSET
from davae.latent import LatentLayout
from davae.losses.base_ahead import base_ahead_times
from davae.losses.flow_matching import shift_timestep

Field = Callable[[Tensor, Any], Tensor]
OnStep = Callable[[int, Tensor], Tensor | None]  # may replace the state
CLEAN = 1.0 - 1e-6  # times of data, as shifted float32 times have them


def time_grid(num_steps: int, timestep_shift: float, detail_offset: float = 0.0) -> Tensor:
    """Return points from 0 to 1 inclusive, shifted by s*t / (1 + (s-1)*t), (num_steps,).

    With an offset, GRACE's clock runs evenly from 1 + delta to 0, and the points are those of base and detail by
    `base_ahead_times`, from noise to data: (num_steps,2).

    Args:
        num_steps: number of points.
        timestep_shift: s.
        detail_offset: delta.

    Raises:
        ValueError: fewer than two points, or a shift that is not positive.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps counts grid points and must be at least 2, found {num_steps}")
    if timestep_shift <= 0:
        raise ValueError(f"timestep_shift must be positive, found {timestep_shift}")
    if not detail_offset:
        return shift_timestep(torch.linspace(0, 1, num_steps), timestep_shift)
    times = base_ahead_times(torch.linspace(1 + detail_offset, 0, num_steps), detail_offset)
    return shift_timestep(1 - torch.stack(times, dim=1), timestep_shift)


def check_labels(class_labels: Tensor, num_classes: int) -> None:
    """Refuse labels (B,) that are not classes of the model, the null class included.

    Raises:
        ValueError: a label out of range.
    """
    if class_labels.numel() and not 0 <= int(class_labels.min()) <= int(class_labels.max()) < num_classes:
        unexpected = class_labels[(class_labels < 0) | (class_labels >= num_classes)][0]
        raise ValueError(
            f"class label {int(unexpected)} is out of range: the model has classes 0 to {num_classes - 1}"
        )


class GuidedModel:
    """A class-conditional model under classifier-free guidance.

    v = v_null + scale (v_class - v_null) where t >= interval_start, v_class elsewhere; t is the base's time, or the detail's
    once the base has arrived. Elsewhere the null half of the batch is not computed. `cfg_channels` guides only the first k
    channels, as the official LightningDiT and DiT do with 3. A learned variance is never guided.

    Raises:
        ValueError: a label that is not a class of the model.
    """

    def __init__(
        self,
        model: Any,
        class_labels: Tensor,
        *,
        cfg_scale: float = 1.0,
        cfg_interval_start: float = 0.0,
        cfg_channels: int | None = None,
    ):
        self.num_classes = int(model.config["num_classes"])
        check_labels(class_labels, self.num_classes)
        self.model, self.labels, self.scale = model, class_labels, cfg_scale
        self.start, self.channels = cfg_interval_start, cfg_channels

    def __call__(self, x: Tensor, t: float, detail_t: float | None = None) -> Tensor:
        """Return the output for x (B,c,h,w) at time t, (B,c,h,w) or (B,2c,h,w) with a variance.

        Args:
            x: the state.
            t: its time, or that of its base.
            detail_t: the time of its detail where that is another one.
        """
        moving = t if detail_t is None or t < CLEAN else detail_t  # a clean base has arrived, and the detail goes on
        if self.scale <= 1.0 or moving < self.start:
            return self._output(x, t, detail_t, self.labels)
        null = torch.full_like(self.labels, self.num_classes)
        both = self._output(torch.cat([x, x]), t, detail_t, torch.cat([self.labels, null]))  # (2B,c,h,w)
        conditional, unconditional = both.chunk(2)
        k = x.shape[1] if self.channels is None else self.channels
        mixed = conditional.clone()
        mixed[:, :k] = unconditional[:, :k] + self.scale * (conditional[:, :k] - unconditional[:, :k])
        return mixed

    def _output(self, x: Tensor, t: float, detail_t: float | None, labels: Tensor) -> Tensor:
        times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
        if detail_t is not None:
            times = torch.stack([times, torch.full_like(times, detail_t)], dim=1)
        return self.model(x, times, labels, return_dict=False)[0]


def stepped(on_step: OnStep, step: int, x: Tensor) -> Tensor:
    """Return the state after a step, or what `on_step` puts in its place."""
    changed = on_step(step, x)
    return x if changed is None else changed.to(x)


def euler(field: Field, x: Tensor, times: Tensor, on_step: OnStep = lambda step, x: None) -> Tensor:
    """Return the state after Euler steps x(t+h) = x + h v(x,t) along `times`.

    Args:
        field: velocity v(x, t).
        x: state (B,c,h,w) at the first time.
        times: (num_steps,), or (num_steps,1,c,1,1) with a time for each channel.
        on_step: called after each step, and may replace the state.
    """
    grid: list[Any] = times.tolist() if times.ndim == 1 else list(times)
    for step, (t, t_next) in enumerate(pairwise(grid)):
        x = x + (t_next - t) * field(x, t)
        x = stepped(on_step, step, x)
    return x


def heun(field: Field, x: Tensor, times: Tensor, on_step: OnStep = lambda step, x: None) -> Tensor:
    """Return the state after steps of Heun's method, of second order with two passes a step.

    Args:
        field: velocity v(x, t).
        x: state (B,c,h,w) at the first time.
        times: (num_steps,), or (num_steps,1,c,1,1) with a time for each channel.
        on_step: called after each step, and may replace the state.
    """
    grid: list[Any] = times.tolist() if times.ndim == 1 else list(times)
    for step, (t, t_next) in enumerate(pairwise(grid)):
        slope = field(x, t)
        predicted = x + (t_next - t) * slope
        x = x + (t_next - t) * (slope + field(predicted, t_next)) / 2
        x = stepped(on_step, step, x)
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun}


@torch.no_grad()
def solve_ode(
    model: Any,
    noise: Tensor,
    class_labels: Tensor,
    num_steps: int,
    *,
    solver: str = "euler",
    timestep_shift: float = 1.0,
    on_step: OnStep = lambda step, x: None,
    times: Tensor | None = None,
    **guidance: Any,
) -> Tensor:
    """Return latents (B,c,h,w) from noise (B,c,h,w) by a named solver.

    The model sees the noise's precision, between its steps the latents are in float32 at least: a step of 1/250 is less
    than bfloat16 can add.

    Args:
        model: a velocity model.
        noise: (B,c,h,w).
        class_labels: (B,).
        num_steps: grid points.
        solver: `euler` or `heun`.
        timestep_shift: s of s*t / (1 + (s-1)*t).
        on_step: called after each step, and may replace the state.
        times: of the grid points in place of `time_grid`'s, (num_steps,) or (num_steps,2).
        guidance: further arguments of `GuidedModel`.

    Raises:
        ValueError: unknown solver, labels out of range, a model that predicts no velocity.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver '{solver}' is unknown; use one of {', '.join(SOLVERS)}")
    predicts = model.config["prediction_type"]
    if predicts != "velocity":
        raise ValueError(f"this model predicts {predicts}, an ODE needs a velocity; use ClassConditionalPipeline")
    guided = GuidedModel(model, class_labels.to(noise.device), **guidance)
    state = noise if noise.dtype == torch.float64 else noise.float()
    grid = time_grid(num_steps, timestep_shift, model.config.get(OFFSET, 0.0)) if times is None else times
    if grid.ndim == 1:

        def field(x: Tensor, t: float) -> Tensor:
            return guided(x.to(noise.dtype), t)

        return SOLVERS[solver](field, state, grid, on_step).to(noise.dtype)

    detail = model.config["detail_channels"]
    layout = LatentLayout(noise.shape[1] - detail, detail)

    def lagging_field(x: Tensor, t: Tensor) -> Tensor:
        return guided(x.to(noise.dtype), *(float(part[0, 0]) for part in layout.split(t)))

    by_channel = torch.stack([layout.by_group(*pair.view(2, 1, 1, 1, 1)) for pair in grid.to(state)])
    return SOLVERS[solver](lagging_field, state, by_channel, on_step).to(noise.dtype)


def euler_ode(
    model: Any,
    noise: Tensor,
    class_labels: Tensor,
    num_steps: int,
    cfg_scale: float = 1.0,
    cfg_interval_start: float = 0.0,
    timestep_shift: float = 1.0,
    cfg_channels: int | None = None,
) -> Tensor:
    """Sample latents with Euler's method.

    The paper (Sec. 4) takes 250 steps, CFG 4.0, the interval from 0.2 and shift 0.3.

    Args:
        model: velocity model called as (latents, timestep, class_labels), with `num_classes` in its config.
        noise: standard normal (B,c,h,w).
        class_labels: (B,) in 0..num_classes-1.
        num_steps: grid points, so num_steps - 1 updates.
        cfg_scale: 1 or less turns guidance off.
        cfg_interval_start: guidance is on where t >= this; t runs 0 (noise) -> 1 (data).
        timestep_shift: s of s*t / (1 + (s-1)*t).
        cfg_channels: guide the first k channels only; None guides all.

    Returns:
        (B,c,h,w).
    """
    return solve_ode(
        model,
        noise,
        class_labels,
        num_steps,
        timestep_shift=timestep_shift,
        cfg_scale=cfg_scale,
        cfg_interval_start=cfg_interval_start,
        cfg_channels=cfg_channels,
    )
