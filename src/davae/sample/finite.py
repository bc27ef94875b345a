"""Decoded images that are not finite, which would be saved black."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from davae.errors import ModelError

SHOWN = 60  # characters of a prompt in a message


def finite_images(values: Tensor) -> list[bool]:
    """Return for each item of a batch (B,...) whether all its values are finite."""
    return torch.isfinite(values).flatten(1).all(1).tolist()


def remedy(dtype: torch.dtype) -> str:
    """Return what a user can do about values that overflow in a dtype."""
    if dtype == torch.float16:
        return "float16 overflows here; use --dtype bfloat16 or float32 (of a run's report: report.dtype)"
    if dtype == torch.bfloat16:
        return "use --dtype float32 (of a run's report: report.dtype)"
    return "the weights are damaged, or their training diverged; use an earlier checkpoint or train again"


@contextmanager
def checked_decoding(pipeline: Any, prompts: Sequence[str]) -> Iterator[None]:
    """Check every image that a pipeline decodes inside the block.

    Args:
        pipeline: a diffusers pipeline with an autoencoder `vae`.
        prompts: the prompts of the images, in order.

    Raises:
        ModelError: an image is not finite; names it by its prompt, and what to do.
    """
    vae = pipeline.vae
    replaced = vars(vae).get("decode")
    decode = vae.decode
    found: list[tuple[bool, bool]] = []  # latents finite, image finite

    @functools.wraps(decode)
    def checked(latents: Tensor, *args: Any, **options: Any) -> Any:
        result = decode(latents, *args, **options)
        images = result[0] if isinstance(result, tuple) else result.sample
        found.extend(zip(finite_images(latents), finite_images(images), strict=True))
        return result

    vae.decode = checked
    try:
        yield
    finally:
        if replaced is None:
            del vae.decode
        else:
            vae.decode = replaced
    _raise_for(found, prompts, vae.dtype)


def _raise_for(found: list[tuple[bool, bool]], prompts: Sequence[str], dtype: torch.dtype) -> None:
    wrong = [number for number, (_, image) in enumerate(found) if not image]
    if not wrong:
        return
    first = prompts[wrong[0]] if len(found) == len(prompts) else prompts[0]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    part = "the autoencoder's output" if found[wrong[0]][0] else "the latents"
    raise ModelError(f"image of {first[:SHOWN]!r}{more}: NaN or infinite values in {part}; {remedy(dtype)}")


def check_reconstruction(images: Tensor, first: int = 0) -> Tensor:
    """Return decoded images (B,3,H,W) unchanged.

    Args:
        first: number of the first image, for the message.

    Raises:
        ModelError: an image is not finite.
    """
    wrong = [number for number, row in enumerate(finite_images(images)) if not row]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"reconstruction of image {first + wrong[0]}{more}: NaN or infinite values from the autoencoder; "
            f"{remedy(images.dtype)}"
        )
    return images
