"""The engines under the loop, all through accelerate: one process, DDP, FSDP2, DeepSpeed. What differs stands here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from davae.device import block_names
from davae.errors import RunError
from davae.recipes.sections import Optim, Run, Stage2
from davae.train.distributed import ranks


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check(accelerator: Accelerator, task: str, trainables: int, run: Run, settings: Optim) -> None:
    """Whether this engine can train the task at all.

    Raises:
        RunError: FSDP of the first kind, an 8-bit optimizer in pieces, and what DeepSpeed cannot do: two networks in turns,
            accumulation, a learning rate of P' and O' alone.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("davae trains with FSDP2; set fsdp_version: 2 in accelerate's config")
    sharded = accelerator.is_fsdp2 or is_deepspeed(accelerator)
    if sharded and settings.optimizer == "adamw-8bit":
        raise RunError(f"{task}.optimizer: adamw-8bit keeps its state in blocks that cannot be sharded; use adamw")
    if is_deepspeed(accelerator) and trainables > 1:
        raise RunError(
            f"{task}: DeepSpeed trains one network, and this one plays against a discriminator; run this stage with DDP or "
            f"FSDP2, or set {task}.lambda_adv=0"
        )

    if is_deepspeed(accelerator) and settings.accumulation > 1:
        raise RunError(
            f"{task}.accumulation: DeepSpeed steps in its backward pass; set it to 1 and raise the batch size"
        )
    if is_deepspeed(accelerator) and isinstance(settings, Stage2) and settings.new_weight_lr_multiplier != 1:
        raise RunError(f"{task}.new_weight_lr_multiplier: DeepSpeed flattens the weights; set it to 1, or use FSDP2")


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, share: int
) -> tuple[nn.Module, Any]:
    """Both, wrapped by the engine; under FSDP2 every repeated block is a unit of its own."""
    if accelerator.is_fsdp2:
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = block_names(module)
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch cuts no other layout
    if is_deepspeed(accelerator):
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share  # type: ignore[union-attr]
    return accelerator.prepare(module, optimizer)


def clip(accelerator: Accelerator, optimizer: Any, limit: float) -> Tensor | None:
    """Clip a player's unscaled gradients in place; return their whole norm before, None where the engine keeps it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if accelerator.scaler is not None:  # accelerate's own would unscale every optimizer, also those of other players
        norm = nn.utils.clip_grad_norm_(parameters, limit)
    else:
        norm = accelerator.clip_grad_norm_(parameters, limit)
    if norm is None:
        return None
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=accelerator.device)


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """Step one optimizer unless `bad`. A fused optimizer decides on the device; others wait for it.

    Args:
        optimizer: as accelerate prepared it; its gradients are unscaled.
    """
    inner = optimizer.optimizer
    step = optimizer.step if optimizer.scaler is None else inner.step  # the wrapper's would unscale and update again
    whole = not any(isinstance(p, DTensor) for p in inner.param_groups[0]["params"])
    if inner.defaults.get("fused") and whole:
        inner.found_inf, inner.grad_scale = bad.float(), None
        step()
    elif not bool(bad):
        step()


def optimizer_state(optimizer: Any, whole_state: Callable[[torch.optim.Optimizer], dict[str, Any]]) -> dict[str, Any]:
    """Whole, by torch's own layout. DeepSpeed's pieces have their own: one of each process, for as many again."""
    if not isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return whole_state(optimizer.optimizer)
    pieces: list[Any] = [None] * ranks()
    dist.all_gather_object(pieces, plain(optimizer.optimizer.state_dict()))
    return {"deepspeed": pieces}


def load_optimizer(
    optimizer: Any, state: dict[str, Any], load_whole: Callable[[torch.optim.Optimizer, dict[str, Any]], None]
) -> None:
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


def plain(value: Any) -> Any:
    """A state without objects of DeepSpeed's own classes, so that a checkpoint stays plain data."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if is_plain(inner)}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.detach().cpu() if isinstance(value, Tensor) else value


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, dict, list, tuple, Tensor))
