"""One call for every stock pipeline: prompts or classes, a size, noise."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from davae.backbones.classes import class_count, class_number
from davae.backbones.families import denoiser, family_of
from davae.errors import ModelError
from davae.pretrained.prompting import guidance_arguments, literal_prompts, text_arguments
from davae.pretrained.shapes import pixel_factor
from davae.sample.finite import checked_decoding
from davae.sample.levels import adds_noise, takes_generator

DIT_NULL = 1000  # the null class that DiTPipeline has in its code


def takes_noise(pipeline: Any) -> bool:
    """Return whether a pipeline takes starting noise, which DiT's does not."""
    return "latents" in inspect.signature(pipeline.__call__).parameters


GUIDES_ONE = ("PRXPipeline",)  # its guidance repeats the timestep twice, whatever the number of prompts


def prompts_at_a_time(pipeline: Any, batch_size: int, guidance_scale: float) -> int:
    """Return how many prompts a pipeline takes in one call.

    Args:
        pipeline: the pipeline that draws.
        batch_size: the most to take.
        guidance_scale: guided pipelines in `GUIDES_ONE` take one.
    """
    return 1 if type(pipeline).__name__ in GUIDES_ONE and guidance_scale > 1 else batch_size


def seeded_steps(pipeline: Any, generators: list[torch.Generator]) -> Any:
    """Return a pipeline whose scheduler draws the noise of its steps from a generator an image.

    It is a copy where the scheduler adds noise; many pipelines pass it no generator.
    """
    scheduler = pipeline.scheduler
    if scheduler is None or not (adds_noise(scheduler) and takes_generator(scheduler)):
        return pipeline
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(scheduler)
    vars(own.scheduler).pop("step", None)  # a preview of the other one
    plain = own.scheduler.step

    @functools.wraps(plain)  # pipelines look at its signature for `generator` and `eta`
    def step(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        if options.get("generator") is None:  # DiT's pipeline carries both halves of guidance, which stay equal
            first = [one.clone_state() for one in generators * (len(sample) // len(generators) - 1)]
            options["generator"] = [*first, *generators]
        return plain(model_output, timestep, sample, **options)

    own.scheduler.step = step
    return own


def call_pipeline(
    pipeline: Any,
    prompts: list[str],
    size: int | tuple[int, int],
    *,
    negative_prompt: str | None = None,
    latents: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator],
    steps: int,
    guidance_scale: float,
    output_type: str = "pil",
    callback_on_step_end: Any = None,
    clean_base: bool = False,
) -> Any:
    """Call a pipeline for images of a size, and return its output, with `.images`.

    Args:
        pipeline: a stock pipeline, or one of davae's.
        prompts: text, or classes by name or number where the pipeline takes classes.
        size: pixels of a square's side, or (height, width).
        negative_prompt: text to guide away from; None is the pipeline's own default.
        latents: starting noise (B,c,h,w). DiT's pipeline takes none and draws it from `generator`.
        generator: source of the noise where `latents` is None, and of the noise that stochastic schedulers add.
        steps: sampling steps.
        guidance_scale: 1 or less turns guidance off.
        output_type: the pipeline's own.
        callback_on_step_end: the pipeline's own, for pipelines that have one.
        clean_base: the base in `latents` is clean, for models in which the detail has a time of its own.

    Raises:
        ModelError: a size, guidance or negative prompt that the pipeline would not follow; an image that is not finite.
    """
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        **guidance_arguments(pipeline, guidance_scale, len(prompts)),
        "generator": generator,
        "output_type": output_type,
    }
    if callback_on_step_end is not None:
        options["callback_on_step_end"] = callback_on_step_end
    if clean_base:
        options["clean_base"] = True
    parameters = inspect.signature(pipeline.__call__).parameters
    if negative_prompt is not None:
        _check_negative(pipeline, guidance_scale > 1, {"guidance_scale", "true_cfg_scale"} <= options.keys())
        options["negative_prompt"] = [negative_prompt] * len(prompts)
    height, width = (size, size) if isinstance(size, int) else size
    checked = nullcontext() if output_type == "latent" else checked_decoding(pipeline, prompts)
    if "class_labels" in parameters:
        _check_dit(pipeline, guidance_scale)
        with _at_size(pipeline, height), checked:
            return pipeline([class_number(pipeline, prompt) for prompt in prompts], **options)
    if "use_resolution_binning" in parameters:  # the size asked for, not the nearest one in a table
        options["use_resolution_binning"] = False
    if latents is not None:
        model = denoiser(pipeline)
        options["latents"] = family_of(model).require_call().pack(latents.to(pipeline._execution_device, model.dtype))
    options |= text_arguments(pipeline) | literal_prompts(pipeline)
    with checked:
        return pipeline(prompt=prompts, height=height, width=width, **options)


def _check_negative(pipeline: Any, guided: bool, distilled: bool) -> None:
    if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ModelError(f"--negative-prompt: a {type(pipeline).__name__} takes none; leave it out")
    if not guided or distilled:
        remedy = "leave it out" if distilled else "use --guidance above 1, or leave it out"
        raise ModelError(f"--negative-prompt: this model is not guided away from anything here; {remedy}")


def _check_dit(pipeline: Any, guidance_scale: float) -> None:
    """Refuse guidance of a model whose null class is not DiT's."""
    count = class_count(pipeline)
    if guidance_scale > 1 and count != DIT_NULL:
        raise ModelError(
            f"a {type(pipeline).__name__} guides away from class {DIT_NULL}, this model has {count} classes; "
            "sample with guidance 1"
        )


@contextmanager
def _at_size(pipeline: Any, size: int) -> Iterator[None]:
    """Set the size at which DiT's pipeline draws, which it reads from its transformer's config."""
    transformer = pipeline.transformer
    own, wanted = transformer.config["sample_size"], size // pixel_factor(pipeline)
    if own == wanted:  # by a call around this one too, which then restores it, in whatever order they end
        yield
        return
    transformer.register_to_config(sample_size=wanted)
    try:
        yield
    finally:
        transformer.register_to_config(sample_size=own)
