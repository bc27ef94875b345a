"""torch.compile for training and drawing: repeated blocks one by one, or whole passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


def block_names(module: nn.Module) -> list[str]:
    """Classes of a model's repeated blocks, as diffusers declares them, that this model has."""
    declared = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return sorted(declared & {type(part).__name__ for part in module.modules()})


def compile_blocks(module: nn.Module, autocast_on: torch.device | None = None) -> None:
    """Compile each repeated block of a model in place, once for all equal blocks.

    Names of parameters stay as they are.

    Args:
        autocast_on: where the blocks will run in mixed precision, if they will.
    """
    # torch 2.14's AVX-512 code of a half-precision backward pass gives NaN, AVX2's does not
    # (tests/backbones/test_lightning_dit.py)
    options: Any = {"cpp.simdlen": 256} if autocast_on is not None and autocast_on.type == "cpu" else None
    names = set(block_names(module))
    for part in module.modules():
        if type(part).__name__ in names:
            part.compile(options=options)


def record_passes(network: Any) -> None:
    """Compile whole passes of a transformer or U-Net in place, recorded on a GPU.

    With `mode="reduce-overhead"` a GPU launches each pass as one CUDA graph. Without it the CPU starts thousands of kernels
    and is the slower of the two. On a CPU passes are only compiled.
    """
    network.compile(mode="reduce-overhead")
    recorded = network._compiled_call_impl

    def own_outputs(*args: Any, **kwargs: Any) -> Any:
        """Return copies of a graph's outputs, which the next pass overwrites and solvers keep."""
        return tree_map_only(torch.Tensor, torch.clone, recorded(*args, **kwargs))

    network._compiled_call_impl = own_outputs
