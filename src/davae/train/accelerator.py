"""Engines under the training loop, through accelerate: one process, DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from davae.device import block_names
from davae.errors import RunError
from davae.recipes.sections import Optim, Run, Stage2
from davae.train.distributed import ranks

PATIENCE = timedelta(hours=2)  # in which the first process encodes, exports or writes while the others wait


def make_accelerator(run: Run, folder: Path | None = None) -> Accelerator:
    """Return accelerate's engine as the launcher chose it: one process, DDP, FSDP2 or DeepSpeed.

    Args:
        run: precision, trackers.
        folder: where trackers write.
    """
    if "ACCELERATE_USE_CPU" not in os.environ and not torch.accelerator.is_available() and "LOCAL_RANK" in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # several processes without a GPU: gloo
    # accelerate keeps one precision a process, and the runs of one process may differ in it
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


def _shard_on_cpu(run: Run) -> None:
    """Switch FSDP2 on without a GPU, which accelerate leaves out, so that tests take its path."""
    plugin = FullyShardedDataParallelPlugin()
    if run.mixed_precision != "no":
        plugin.set_mixed_precision(run.mixed_precision)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def seed_initial_weights(seed: int) -> None:
    """Make new weights depend on the recipe's seed alone, not on earlier work of the process."""
    torch.manual_seed(seed)


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_base_engine(accelerator: Accelerator) -> None:
    """Refuse to cut a small model that is trained from scratch into pieces.

    Raises:
        RunError: under FSDP and DeepSpeed.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RunError(
            "base models and super-resolution networks train in one process or with DDP; "
            "FSDP2 and DeepSpeed are for upgrades"
        )


def check_engine(accelerator: Accelerator, task: str, trainables: int, settings: Optim) -> None:
    """Refuse a training that this engine cannot run.

    Args:
        accelerator: the engine.
        task: name of the training.
        trainables: how many networks it trains.
        settings: of the training, with the passes of this engine as `accumulation`.

    Raises:
        RunError: FSDP of the first kind, an 8-bit optimizer in pieces, and under DeepSpeed two networks, accumulation, or a
            learning rate of P' and O' alone.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("davae trains with FSDP2; set fsdp_version: 2 in accelerate's config")
    deepspeed = is_deepspeed(accelerator)
    if (accelerator.is_fsdp2 or deepspeed) and settings.optimizer == "adamw-8bit":
        raise RunError(f"{task}.optimizer: adamw-8bit keeps its state in blocks that cannot be sharded; use adamw")
    if deepspeed and trainables > 1:
        raise RunError(
            f"{task}: DeepSpeed trains one network, and this one plays against a discriminator; run this stage with DDP or "
            f"FSDP2, or set {task}.lambda_adv=0"
        )
    if deepspeed and settings.accumulation > 1:
        raise RunError(
            f"{task}.accumulation: DeepSpeed steps in its backward pass; set it to 1 and raise the batch size"
        )
    if deepspeed and isinstance(settings, Stage2) and settings.new_weight_lr_multiplier != 1:
        raise RunError(f"{task}.new_weight_lr_multiplier: DeepSpeed flattens the weights; set it to 1, or use FSDP2")


def wrap(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, share: int
) -> tuple[nn.Module, Any]:
    """Return module and optimizer wrapped by the engine, each repeated block a unit of FSDP2.

    Args:
        accelerator: the engine.
        module: called in the task's loss.
        optimizer: of its weights.
        share: images of one pass in one process.
    """
    if accelerator.is_fsdp2:
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = block_names(module)
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch cuts no other layout
    if is_deepspeed(accelerator):
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share  # type: ignore[union-attr]
    return accelerator.prepare(module, optimizer)


def clip_gradients(accelerator: Accelerator, optimizer: Any, limit: float) -> Tensor | None:
    """Clip the unscaled gradients of one optimizer in place, by their norm.

    Args:
        accelerator: the engine.
        optimizer: as the engine wrapped it.
        limit: of the norm.

    Returns:
        The whole norm before, a scalar; None where the engine keeps it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if accelerator.scaler is not None:  # accelerate's own would unscale every optimizer, also the others of a GAN
        norm = nn.utils.clip_grad_norm_(parameters, limit)
    else:
        norm = accelerator.clip_grad_norm_(parameters, limit)
    if norm is None:
        return None
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=accelerator.device)


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """Step one optimizer unless `bad`, which a fused one decides without waiting for the device.

    Args:
        optimizer: as the engine wrapped it; its gradients are unscaled.
        bad: a boolean scalar.
    """
    inner = optimizer.optimizer
    step = optimizer.step if optimizer.scaler is None else inner.step  # the wrapper's would unscale and update again
    in_pieces = any(isinstance(p, DTensor) for p in inner.param_groups[0]["params"])
    if inner.defaults.get("fused") and not in_pieces:
        inner.found_inf, inner.grad_scale = bad.float(), None
        step()
    elif not bool(bad):
        step()


class LossScale:
    """The GradScaler of fp16 training, or nothing where the precision needs none.

    accelerate's own calls unscale the gradients of all optimizers at once and update the scale after each of them. With two
    optimizers (a GAN) the second one would then be unscaled twice. Here one optimizer is unscaled at a time, and the scale
    is updated once a step.

    Args:
        accelerator: its `scaler` scales the loss in `accelerator.backward`.
    """

    FLOOR = 1.0  # an overflow at this scale or below is not the scale's fault

    def __init__(self, accelerator: Accelerator):
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        self._initial = self.state()

    def unscale(self, optimizer: Any) -> None:
        """Divide the gradients of one wrapped optimizer by the scale, in place."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)

    def update(self) -> None:
        """Lower the scale after an overflow in any optimizer, raise it after many good steps."""
        if self.scaler is not None:
            self.scaler.update()

    def counts(self, bad: Tensor, lost: Tensor) -> Tensor:
        """Return whether a skipped step counts towards the end of the run, a boolean scalar.

        An overflow of the scaled gradient is how a scaler finds its scale. It counts once the loss itself is not finite or
        the scale cannot be the cause.

        Args:
            bad: whether the gradient was not finite.
            lost: whether a loss was not finite.
        """
        return bad if self.scaler is None or self.scaler.get_scale() <= self.FLOOR else bad & lost

    def state(self) -> dict[str, Any]:
        """Return scale and growth counter, plain values, empty without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, unless it is empty: an older checkpoint, another precision."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def reset(self) -> None:
        """Return to the state in which this training found the scaler, as a resumed run does."""
        self.load(self._initial)


def gather_optimizer(
    optimizer: Any, whole_state: Callable[[torch.optim.Optimizer], dict[str, Any]]
) -> dict[str, Any]:
    """Return an optimizer's state for a checkpoint, under DeepSpeed a piece of each process.

    Args:
        optimizer: as the engine wrapped it.
        whole_state: gathers the state of torch's own optimizer.
    """
    if not isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return whole_state(optimizer.optimizer)
    pieces: list[Any] = [None] * ranks()
    dist.all_gather_object(pieces, _plain_state(optimizer.optimizer.state_dict()))
    return {"deepspeed": pieces}


def load_optimizer(
    optimizer: Any, state: dict[str, Any], load_whole: Callable[[torch.optim.Optimizer, dict[str, Any]], None]
) -> None:
    """Put a state of `gather_optimizer` back.

    Args:
        optimizer: as the engine wrapped it.
        state: from a checkpoint.
        load_whole: puts the state of torch's own optimizer back.

    Raises:
        RunError: another engine wrote the state, or another number of DeepSpeed's processes.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper) != ("deepspeed" in state):
        raise RunError(
            "the checkpoint was written by DeepSpeed, or this run uses it; go on with the engine that wrote it"
        )
    if "deepspeed" not in state:
        load_whole(optimizer.optimizer, state)
        return
    if len(state["deepspeed"]) != ranks():
        raise RunError(
            f"the checkpoint was written by {len(state['deepspeed'])} processes of DeepSpeed; use as many again"
        )
    optimizer.optimizer.load_state_dict(state["deepspeed"])


def _plain_state(value: Any) -> Any:
    """Return a state without objects of DeepSpeed's classes: a checkpoint stays plain data."""
    plain = (bool, int, float, str, dict, list, tuple, Tensor)
    if isinstance(value, dict):
        return {key: _plain_state(v) for key, v in value.items() if v is None or isinstance(v, plain)}
    if isinstance(value, (list, tuple)):
        return [_plain_state(inner) for inner in value]
    return value.detach().cpu() if isinstance(value, Tensor) else value
