"""Noisy canvases of images whose base is known, and the overlapping windows that cover them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from davae.latent import LatentLayout
from davae.sample.levels import adds_noise, clean_from, level_after, takes_generator
from davae.sample.skip_calls import REACH

DRAFT_LEVEL = 0.5  # share of noise above which a draft of the detail is known; chosen in docs/three-jobs.md


@dataclass(frozen=True)
class WindowGrid:
    """Windows of one size that cover a canvas.

    Attributes:
        height, width: of the canvas, in latent positions.
        window: side of a window.
        tops, lefts: first rows and first columns of the windows.
    """

    height: int
    width: int
    window: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, height: int, width: int, window: int, overlap: float, grain: int = 1) -> WindowGrid:
        """Return the fewest windows that cover a canvas and overlap by at least a share.

        Args:
            height, width: of the canvas, at least `window`; multiples of `grain`.
            overlap: share of a window's side, in [0, 0.75].
            grain: windows begin at multiples of it.
        """
        tops, lefts = (_starts(length, window, overlap, grain) for length in (height, width))
        return cls(height, width, window, tops, lefts)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def gather(self, canvas: Tensor) -> Tensor:
        """Return the windows (N,c,w,w) of a canvas (1,c,H,W), row by row."""
        side = self.window
        return torch.cat([canvas[:, :, y : y + side, x : x + side] for y in self.tops for x in self.lefts])

    def blend(self, parts: Tensor) -> Tensor:
        """Return the canvas (1,c,H,W) of weighted means of the windows (N,c,w,w).

        The weights fall linearly from a window's centre to its edge, so that no window ends in a step.
        """
        if len(parts) == 1:
            return parts
        side = self.window
        slope = torch.arange(side, device=parts.device, dtype=parts.dtype) + 0.5
        ramp = torch.minimum(slope, slope.flip(0)) / side  # (w,)
        weight = ramp[:, None] * ramp
        total = parts.new_zeros(1, parts.shape[1], self.height, self.width)
        weights = parts.new_zeros(self.height, self.width)
        corners = [(y, x) for y in self.tops for x in self.lefts]
        for part, (y, x) in zip(parts, corners, strict=True):
            total[0, :, y : y + side, x : x + side] += part * weight
            weights[y : y + side, x : x + side] += weight
        return total / weights


def _starts(length: int, window: int, overlap: float, grain: int) -> tuple[int, ...]:
    if length <= window:
        return (0,)
    stride = max(grain, int(window * (1 - overlap)) // grain * grain)
    count = -(-(length - window) // stride) + 1
    return tuple(round((length - window) * n / (count - 1) / grain) * grain for n in range(count))


@dataclass
class Enlargement:
    """One image to draw detail for.

    Attributes:
        z: its normalised base latent (1,C,H,W).
        noise: structured standard normal noise (1,C+D,H,W), one for all steps and windows.
        grid: the windows that cover it.
        prompt: text, or a class by name or number.
        generator: what a stochastic scheduler draws from.
        draft: normalised detail (1,D,H,W) that the drawing begins with, in place of noise alone.
    """

    z: Tensor
    noise: Tensor
    grid: WindowGrid
    prompt: str
    generator: torch.Generator
    draft: Tensor | None = None


class Canvas:
    """The noisy latents of one image while they are drawn, and the scheduler that steps them.

    Every step blends the windows' predictions, steps the whole canvas once (so that solvers with memory and the noise of
    stochastic ones know no windows), and puts the known base in place: x_base = a z + s n at the new level
    (`Level.state`). A draft of the detail is known in the same way down to `DRAFT_LEVEL`, from where the model goes on, as
    in SDEdit (Meng et al., 2022); steps whose predictions no state uses call no model.

    Args:
        free: share of the scheduler's steps, at the end, in which the base is free.
        clean: the base stays at z, without noise, at every level: for models that were trained for it.
    """

    def __init__(self, work: Enlargement, layout: LatentLayout, device: torch.device, free: float, clean: bool):
        self.grid, self.layout, self.free, self.clean = work.grid, layout, free, clean
        self.generator = work.generator
        self.z, self.noise = work.z.float().to(device), work.noise.float().to(device)
        self.draft = None if work.draft is None else work.draft.float().to(device)
        self.state: Tensor | None = None
        self._before: Tensor | None = None  # the state one step earlier
        self.calls = 0
        self._scheduler: Any = None

    def first(self) -> Tensor:
        """Return the windows of what a pipeline takes as starting noise."""
        n, n_d = self.layout.split(self.noise)
        return self.grid.gather(self.layout.join(self.z if self.clean else n, n_d))

    def start(self, pipeline: Any) -> Tensor:
        """Return the windows of the starting state, made on the first call."""
        if self.state is None:
            sigma = 1.0 if pipeline.scheduler is None else float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))
            self.state = self._with_known(self.noise * sigma, pipeline)
        return self.grid.gather(self.state)

    def step(self, pipeline: Any, outputs: Tensor, timestep: Any, options: dict[str, Any]) -> Tensor:
        """Return the windows (N,c,w,w) after a step.

        Args:
            outputs: what the model predicts for the windows, after guidance; without a scheduler, the windows' next states.
            timestep, options: what the pipeline gives its scheduler's `step`.
        """
        self.start(pipeline)
        assert self.state is not None
        moved = self.grid.blend(outputs.float().to(self.z.device))
        if pipeline.scheduler is not None:
            moved = self._stepped(pipeline.scheduler, moved, timestep, options)
        self.calls += 1
        self._before = self.state
        self.state = self._with_known(moved, pipeline)
        return self.grid.gather(self.state)

    def clean_base(self, pipeline: Any) -> Tensor:
        """Return an estimate of the clean base latent (1,C,H,W), z itself while it is known."""
        if (
            self._before is None
            or self.state is None
            or step_count(pipeline) - self.calls >= self._free_calls(pipeline)
        ):
            return self.z
        before, after = (self.layout.split(state)[0] for state in (self._before, self.state))
        start, end = level_after(pipeline, self.calls - 1), level_after(pipeline, self.calls)
        if pipeline.scheduler is not None and adds_noise(pipeline.scheduler):
            return after / max(end.data, 0.1)
        return clean_from(before, after, start, end)

    def _stepped(self, scheduler: Any, prediction: Tensor, timestep: Any, options: dict[str, Any]) -> Tensor:
        if self._scheduler is None:  # with the pipeline's timesteps, and a memory of its own
            self._scheduler = copy.deepcopy(scheduler)
            for name in ("step", "scale_model_input"):
                vars(self._scheduler).pop(name, None)
            self._scheduler.is_scale_input_called = True
        if takes_generator(self._scheduler):  # few pipelines pass theirs on
            options = {**options, "generator": self.generator}
        return self._scheduler.step(prediction, timestep, self.state, **{**options, "return_dict": False})[0]

    def ignores(self, pipeline: Any) -> bool:
        """Return whether all states that the next prediction reaches are known."""
        scheduler = pipeline.scheduler
        reach = REACH.get(None if scheduler is None else type(scheduler).__name__, step_count(pipeline))
        reached = self.calls + 1 + reach
        left = step_count(pipeline) - reached
        if self.draft is None or left < max(self._free_calls(pipeline), 1):
            return False
        return level_after(pipeline, reached, detail=True).share > DRAFT_LEVEL

    def share_index(self, scheduler: Any) -> None:
        """Set the step of a pipeline's scheduler to this canvas's, for `scale_model_input`."""
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = self._scheduler._step_index

    def _free_calls(self, pipeline: Any) -> int:
        return math.ceil(self.free * step_count(pipeline) - 1e-9)  # Heun's scheduler counts two for most of its steps

    def _with_known(self, latents: Tensor, pipeline: Any) -> Tensor:
        if step_count(pipeline) - self.calls < self._free_calls(pipeline):
            return latents
        level, of_detail = (level_after(pipeline, self.calls, detail=detail) for detail in (False, True))
        _, z_d = self.layout.split(latents)
        n, n_d = self.layout.split(self.noise)
        if self.draft is not None and of_detail.share > DRAFT_LEVEL:
            z_d = of_detail.state(self.draft, n_d)
        return self.layout.join(level.clean(self.z) if self.clean else level.state(self.z, n), z_d)


def step_count(pipeline: Any) -> int:
    """Return the steps of the drawing that runs."""
    return len(pipeline.times) - 1 if pipeline.scheduler is None else len(pipeline.scheduler.timesteps)
