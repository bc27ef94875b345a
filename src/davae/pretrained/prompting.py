"""Arguments with which a loaded pipeline is called, and embeddings of captions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from davae.backbones.families import denoiser, family_by_class, family_of


def silent_t5(pipeline: Any) -> bool:
    """Return whether a Stable Diffusion 3 has no third text encoder, or one scaled to zero."""
    if not hasattr(pipeline, "text_encoder_3"):
        return False
    encoder = pipeline.text_encoder_3
    if encoder is None:
        return True
    norm = encoder.encoder.final_layer_norm
    with align_module_device(norm):  # its weight, where sequential offloading leaves an empty one
        return not bool(norm.weight.any())


def text_arguments(pipeline: Any) -> dict[str, Any]:
    """Return arguments that keep a prompt short: one zero token of a silent T5 instead of 256."""
    return {"max_sequence_length": 1} if silent_t5(pipeline) else {}


def literal_prompts(pipeline: Any) -> dict[str, Any]:
    """Return arguments that keep a pipeline from rewriting prompts by a language model."""
    takes = inspect.signature(pipeline.__call__).parameters
    return {name: False for name in ("enable_prompt_rewrite", "use_pe") if name in takes}


def guidance_arguments(pipeline: Any, scale: float, prompts: int) -> dict[str, Any]:
    """Return arguments that guide a pipeline's prompts, as `Family.guide` makes them.

    Args:
        pipeline: the pipeline that is called.
        scale: guidance scale; 1 or less turns guidance off.
        prompts: number of prompts in the call.
    """
    transformer = denoiser(pipeline)
    return family_of(transformer).guide(transformer.config, scale, prompts)


@torch.no_grad()
def embed_captions(pipeline: Any, captions: list[str], transformer_class: str) -> tuple[Tensor, ...]:
    """Return embeddings of captions by a pipeline's text encoders, one tensor per kind, (B,...).

    Args:
        pipeline: with its text encoders; its transformer may be left out.
        captions: B captions.
        transformer_class: class of the transformer, which decides the kinds.
    """
    return family_by_class(transformer_class).require_call().embed(pipeline, captions, text_arguments(pipeline))
