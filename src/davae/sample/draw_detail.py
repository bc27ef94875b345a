"""Detail drawn by a stock pipeline for a base that follows its known path."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from davae.backbones.expand import CLEAN_BASE
from davae.backbones.families import component_in, denoiser
from davae.backbones.packed_latents import pack_like, unpack_latents
from davae.errors import ModelError
from davae.sample.call import call_pipeline, prompts_at_a_time
from davae.sample.canvas import Canvas, Enlargement, step_count
from davae.sample.lockstep import Exchange, Left, together
from davae.sample.skip_calls import skipping

TWO_OUTPUTS = ("CogVideoXDPMScheduler",)  # steps that take and give a second tensor


OnBase = Callable[[int, list[Tensor]], None]
Handed = tuple[Any, Tensor, Any, dict[str, Any]]  # the pipeline, predictions, timestep, further arguments of a step


class _Group:
    """The windows of several images, and which of them a call of the pipeline draws."""

    def __init__(
        self, canvases: Sequence[Canvas], batch_size: int, on_step: Callable[[int, int], None], on_base: OnBase | None
    ):
        self.canvases, self.on_step, self.on_base = canvases, on_step, on_base
        total = sum(len(canvas.grid) for canvas in canvases)
        self.parts = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]

    def start(self, pipeline: Any, part: range) -> Tensor:
        return torch.cat([canvas.start(pipeline) for canvas in self.canvases])[part.start : part.stop]

    def meet(self, handed: list[Handed]) -> list[Tensor]:
        """Step every canvas once all its windows are there, and return each call's windows."""
        pipeline, _, timestep, options = handed[0]
        outputs = torch.cat([prediction for _, prediction, _, _ in handed])
        windows, first = [], 0
        for canvas in self.canvases:
            some = outputs[first : first + len(canvas.grid)]
            windows.append(canvas.step(pipeline, some, timestep, options))
            first += len(canvas.grid)
        for own, *_ in handed:
            self.canvases[0].share_index(own.scheduler)
        joined = torch.cat(windows)
        if self.on_base is not None:
            self.on_base(self.canvases[0].calls, [canvas.clean_base(pipeline) for canvas in self.canvases])
        self.on_step(self.canvases[0].calls, step_count(pipeline))
        return [joined[part.start : part.stop] for part in self.parts]


@torch.no_grad()
def draw_detail(
    pipeline: Any,
    work: Sequence[Enlargement],
    *,
    strength: float,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_base: OnBase | None = None,
) -> list[Tensor]:
    """Draw the detail channels of images whose base is known, through an unmodified pipeline.

    All windows have one size. A canvas of more windows than `batch_size` is drawn by several calls that meet at every step.

    Args:
        pipeline: an upgraded pipeline of any family that `davae upgrade` trains.
        work: the images.
        strength, steps, guidance_scale: as `davae.upscale` takes them.
        batch_size: windows that the model sees at a time.
        on_step: called with the steps that are done and their number.
        on_base: called after each step with its number and an estimate of each image's clean base latent (1,C,H,W).

    Returns:
        Normalised z_hr (1,C+D,H,W) of each image; at strength 0 its base channels are z exactly.

    Raises:
        ModelError: a scheduler whose levels are not known.
    """
    _check_steps(pipeline.scheduler)
    free = free_steps(steps, strength)
    clean, knows = _clean_base(denoiser(pipeline).config, free)
    device, side = pipeline._execution_device, work[0].grid.window
    canvases = [Canvas(one, pipeline.vae.layout, device, free / steps, clean) for one in work]
    group = _Group(canvases, prompts_at_a_time(pipeline, batch_size, guidance_scale), on_step, on_base)
    prompts = [one.prompt for one in work for _ in range(len(one.grid))]
    noise = torch.cat([canvas.first() for canvas in canvases])

    def draw(part: range, exchange: Exchange[Handed, Tensor]) -> None:
        hooked = _hooked(pipeline, functools.partial(group.start, part=part), exchange, len(part), side)
        with hooked as (own, options):
            _skip_calls(own, canvases[0])
            call_pipeline(
                own,
                prompts[part.start : part.stop],
                side * pipeline.vae.spatial_factor,
                latents=noise[part.start : part.stop],
                generator=[torch.Generator().manual_seed(0) for _ in part],  # for noise that the canvas draws itself
                steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
                clean_base=clean and knows,
                **options,
            )

    try:
        together([functools.partial(draw, part) for part in group.parts], group.meet)
    finally:
        pipeline.maybe_free_model_hooks()
    return [_finished(canvas) for canvas in canvases]


def free_steps(steps: int, strength: float) -> int:
    """Return the number of last steps with a free base, as image-to-image pipelines count."""
    return int(steps * strength + 1e-9)


def _check_steps(scheduler: Any) -> None:
    if (kind := type(scheduler).__name__) in TWO_OUTPUTS:
        raise ModelError(f"scheduler {kind}: it cannot enlarge; use DDIMScheduler in its place")


def _skip_calls(own: Any, canvas: Canvas) -> None:
    """Replace the model of a pipeline's copy by one that skips the calls that a canvas ignores."""
    vars(own)[component_in(own.components)] = skipping(denoiser(own), functools.partial(canvas.ignores, own))


def _clean_base(config: Any, free: int) -> tuple[bool, bool]:
    """Return whether the base stays clean, and whether the model gets the time of such a base.

    Where the base is free in the last `free` steps it follows its noisy path instead: a clean one has no noise to move, and
    no model was trained to predict its velocity.
    """
    return bool(config.get(CLEAN_BASE)) and not free, bool(config.get("detail_channels"))


def _finished(canvas: Canvas) -> Tensor:
    if canvas.state is None or canvas.calls == 0:
        raise ModelError("the pipeline made no step that davae can see; it cannot enlarge")
    return canvas.state


@contextmanager
def _hooked(
    pipeline: Any, start: Callable[[Any], Tensor], exchange: Exchange[Handed, Tensor], rows: int, side: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield a copy of a pipeline whose scheduler hands over to a canvas, and call arguments.

    Args:
        start: windows of the starting state.
        rows: windows that the call draws; some pipelines carry both halves of guidance through their scheduler.
        side: of a window.
    """
    own = copy.copy(pipeline)
    if pipeline.scheduler is None:

        def on_step_end(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            windows = exchange((own, kwargs["latents"], timestep, {}))
            _leave_at_end(own, step + 1)
            return {"latents": windows}

        yield own, {"callback_on_step_end": on_step_end}
        return
    scheduler = copy.deepcopy(pipeline.scheduler)
    own.scheduler = scheduler
    done = 0

    @functools.wraps(scheduler.step)  # pipelines look at its signature for `generator` and `eta`
    def step(model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **options: Any) -> Any:
        nonlocal done
        prediction = unpack_latents(model_output, side, side)[:rows]
        windows = exchange((own, prediction, timestep, options))
        done += 1
        _leave_at_end(own, done)
        after = pack_like(windows.repeat(len(sample) // rows, 1, 1, 1), sample)
        return SchedulerOutput(prev_sample=after) if return_dict else (after, after)

    scheduler.step = step
    if hasattr(scheduler, "scale_model_input"):
        scale = scheduler.scale_model_input

        def scale_model_input(sample: Tensor, timestep: Any = None) -> Tensor:
            if done == 0:
                sample = pack_like(start(own).repeat(len(sample) // rows, 1, 1, 1), sample)
            return scale(sample, timestep)

        scheduler.scale_model_input = scale_model_input
    yield own, {}


def _leave_at_end(pipeline: Any, done: int) -> None:
    """Leave after the last step, because the canvas is decoded as a whole."""
    if done >= step_count(pipeline):
        raise Left
