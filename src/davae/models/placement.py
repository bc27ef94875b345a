"""Where a pipeline computes, and how exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from accelerate import PartialState

from davae.models.pipeline import ModelError

Precision = Literal["float32", "bfloat16", "float16"]
Offload = Literal["off", "model", "sequential"]


def own_device() -> torch.device:
    """This process's device: the accelerator where there is one, by accelerate's choice."""
    return cast(torch.device, PartialState().device)


def send(
    tensor: torch.Tensor, device: torch.device, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """A tensor on a device. From the CPU to a GPU through pinned memory: otherwise the CPU would wait until the GPU is done
    with all that it was given before, every step."""
    if memory_format is not None:
        tensor = tensor.contiguous(memory_format=memory_format)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Placement:
    """Precision of the weights, and whether they wait in the CPU's memory.

    Attributes:
        offload: `model` keeps each model of a pipeline there until its turn, `sequential` each layer: least memory, and slow.
    """

    precision: Precision = "float32"
    offload: Offload = "off"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    @property
    def changes(self) -> dict[str, str]:
        """What pictures depend on, where it is not the default."""
        return {} if self.precision == FULL.precision else {"dtype": self.precision}

    def place(self, pipeline: Any) -> Any:
        """A loaded pipeline, ready to draw on this process's device.

        Raises:
            ModelError: offloading where there is no other device than the CPU.
        """
        device = own_device()
        if self.offload == "off":
            return pipeline.to(device)
        if device.type == "cpu":
            raise ModelError(
                f"--offload {self.offload} keeps weights away from a GPU, and there is none here; leave it out"
            )
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_sequential_cpu_offload(device=device)
        return pipeline


FULL = Placement()
