"""One way to call every stock pipeline: prompts or classes, a size, noise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from davae.backbones.classes import class_count, class_number
from davae.backbones.families import denoiser, family_of
from davae.errors import ModelError
from davae.pretrained.open import guidance_arguments, literal_prompts, pixel_factor, text_arguments
from davae.sample.finite import checked_decoding

DIT_NULL = 1000  # the null class that DiTPipeline has in its code


def takes_noise(pipeline: Any) -> bool:
    """Whether a pipeline can be given its starting noise; DiT's cannot."""
    return "latents" in inspect.signature(pipeline.__call__).parameters


GUIDES_ONE = ("PRXPipeline",)  # its guidance repeats the timestep twice, whatever the number of prompts


def at_a_time(pipeline: Any, batch_size: int, guidance_scale: float) -> int:
    """Return how many prompts a pipeline takes in one call: `batch_size`, or one where it can guide no more."""
    return 1 if type(pipeline).__name__ in GUIDES_ONE and guidance_scale > 1 else batch_size


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
) -> Any:
    """Return what the pipeline returns for images of a size, `.images` among it.

    Args:
        prompts: text, or classes by name or number where the pipeline takes classes.
        size: pixels of a square's side, or (height, width).
        negative_prompt: what to guide away from; None is the pipeline's own default.
        latents: starting noise (B,c,h,w). DiT's pipeline takes none and draws it from `generator`.
        generator: draws the noise where `latents` is None, and what stochastic schedulers add.
        callback_on_step_end: the pipeline's own, for pipelines that have one.

    Raises:
        ModelError: DiT's pipeline asked to guide a model whose null class is not the one it has in its code, or for an image
            that is not a square; a negative prompt that the pipeline would ignore; an image that is not finite.
    """
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        **guidance_arguments(pipeline, guidance_scale, len(prompts)),
        "generator": generator,
        "output_type": output_type,
    }
    if callback_on_step_end is not None:
        options["callback_on_step_end"] = callback_on_step_end
    parameters = inspect.signature(pipeline.__call__).parameters
    if negative_prompt is not None:
        if "negative_prompt" not in parameters:
            raise ModelError(f"--negative-prompt: a {type(pipeline).__name__} takes none; leave it out")
        if guidance_scale <= 1 or options.get("true_cfg_scale") == 1:
            raise ModelError(
                "--negative-prompt: this model is not guided away from anything here; use --guidance above 1, or leave it out"
            )
        options["negative_prompt"] = [negative_prompt] * len(prompts)
    height, width = (size, size) if isinstance(size, int) else size
    if "class_labels" in parameters:
        if height != width:
            raise ModelError(
                f"a {type(pipeline).__name__} draws squares, {width} x {height} is none; use --resolution"
            )
        count = class_count(pipeline)
        if guidance_scale > 1 and count != DIT_NULL:
            raise ModelError(
                f"a {type(pipeline).__name__} guides away from class {DIT_NULL}, this model has {count} classes; "
                "sample with guidance 1"
            )
        with _at_size(pipeline, height), checked_decoding(pipeline, prompts):
            return pipeline([class_number(pipeline, prompt) for prompt in prompts], **options)
    if "use_resolution_binning" in parameters:  # the size asked for, not the nearest one in a table
        options["use_resolution_binning"] = False
    if latents is not None:
        model = denoiser(pipeline)
        options["latents"] = family_of(model).require_call().pack(latents.to(pipeline._execution_device, model.dtype))
    options |= text_arguments(pipeline) | literal_prompts(pipeline)
    with checked_decoding(pipeline, prompts):
        return pipeline(prompt=prompts, height=height, width=width, **options)


@contextmanager
def _at_size(pipeline: Any, size: int) -> Iterator[None]:
    """DiT's pipeline draws at the size in its transformer's config and takes no other."""
    transformer = pipeline.transformer
    own = transformer.config["sample_size"]
    transformer.register_to_config(sample_size=size // pixel_factor(pipeline))
    try:
        yield
    finally:
        transformer.register_to_config(sample_size=own)
