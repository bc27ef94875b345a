"""What every training run opens first: accelerator, seeds."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)

from davae.errors import RunError
from davae.recipes.sections import Run

PATIENCE = timedelta(hours=2)  # how long processes wait for the first one to encode, export or write


def make_accelerator(run: Run, folder: Path | None = None) -> Accelerator:
    """The engine that `accelerate launch` chose: one process, DDP, FSDP2 or DeepSpeed.

    Args:
        folder: where trackers write.
    """
    if "ACCELERATE_USE_CPU" not in os.environ and not torch.accelerator.is_available() and "LOCAL_RANK" in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # several processes without a GPU: gloo
    # accelerate keeps one precision a process; a table's rows may differ
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != run.mixed_precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=list(run.trackers) or None,
        project_dir=folder,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(find_unused_parameters=run.find_unused_parameters),
        ],
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _shard_on_cpu(run)
    return accelerator


def check_base_engine(accelerator: Accelerator) -> None:
    """RunError where a small model that is trained from scratch would be cut into pieces."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RunError(
            "base models and super-resolution networks train in one process or with DDP; "
            "FSDP2 and DeepSpeed are for upgrades"
        )


def _shard_on_cpu(run: Run) -> None:
    """accelerate leaves FSDP out where there is no GPU; torch does not need one. Switched on for tests of the same path."""
    plugin = FullyShardedDataParallelPlugin()
    if run.mixed_precision != "no":
        plugin.set_mixed_precision(run.mixed_precision)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def seed_initial_weights(seed: int) -> None:
    """New weights depend on the recipe's seed alone, not on what ran before."""
    torch.manual_seed(seed)
