"""Device and precision in which a pipeline computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from accelerate import PartialState

from davae.backbones.families import denoiser
from davae.device import block_names, compile_blocks, record_passes
from davae.errors import ModelError

Precision = Literal["float32", "bfloat16", "float16"]
AnyPrecision = Precision | torch.dtype  # kept by its name
Offload = Literal["off", "model", "sequential"]
Compile = Literal["off", "blocks", "graphs"]


def own_device() -> torch.device:
    """Return this process's device: the accelerator where there is one, by accelerate's choice."""
    return cast(torch.device, PartialState().device)


def send(
    tensor: torch.Tensor, device: torch.device, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """Return a tensor on a device.

    It goes from the CPU to a GPU through pinned memory: otherwise the CPU would wait at each step for all earlier work."""
    if memory_format is not None:
        tensor = tensor.contiguous(memory_format=memory_format)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Placement:
    """Precision of the weights, offloading to the CPU's memory, and compilation of passes.

    Attributes:
        offload: `model` keeps each model of a pipeline there until its turn, `sequential` each layer: least memory, and slow.
        compile: `blocks` compiles each repeated block, `graphs` records whole passes (`record_passes`).
    """

    precision: AnyPrecision = "float32"
    offload: Offload = "off"
    compile: Compile = "off"

    def __post_init__(self) -> None:
        name = str(self.precision).removeprefix("torch.")
        if name not in get_args(Precision):
            raise ModelError(f"dtype: found {name}; use {', '.join(get_args(Precision))}")
        object.__setattr__(self, "precision", name)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self.precision))

    @property
    def changes(self) -> dict[str, str]:
        """Return the settings that change images and differ from the default."""
        return {} if self.precision == FULL.precision else {"dtype": str(self.precision)}

    def place(self, pipeline: Any) -> Any:
        """Place a loaded pipeline on this process's device, ready to draw, and return it.

        Raises:
            ModelError: offloading or graphs without a GPU, both at once, or a model without named blocks to compile.
        """
        device = own_device()
        if self.compile != "off":
            self._compile(denoiser(pipeline), device)
        if self.offload == "off":
            return pipeline.to(device)
        if device.type == "cpu":
            raise ModelError(f"--offload {self.offload} needs a GPU, and there is none here; leave it out")
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_sequential_cpu_offload(device=device)
        return pipeline

    def _compile(self, network: Any, device: torch.device) -> None:
        if self.offload != "off":
            raise ModelError(f"--compile {self.compile} and --offload {self.offload} exclude one another; choose one")
        if self.compile == "graphs":
            if device.type != "cuda":
                raise ModelError("--compile graphs needs a GPU: no GPU here; use --compile blocks")
            record_passes(network)
        elif block_names(network):
            compile_blocks(network)
        else:
            raise ModelError(f"a {type(network).__name__} names no repeated blocks; leave --compile blocks out")


FULL = Placement()
