"""LoRA files in any layout that a pipeline reads, under diffusers' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from davae.errors import ModelError
from davae.pretrained.hub_errors import brief

UP = re.compile(r"lora_B\.|(?:lora|lora_linear_layer)[._]up\.")  # B of a LoRA under diffusers' and kohya's names


def check_lora_file(file: Path) -> None:
    """Check a LoRA file by its header, before a model is loaded.

    Raises:
        ModelError: no such file, not a safetensors file, or a DoRA.
    """
    if not file.is_file():
        raise ModelError(f"LoRA file {file} does not exist")
    if file.suffix != ".safetensors":
        raise ModelError(f"LoRA file {file} is not a .safetensors file; no code of a checkpoint is ever run")
    try:
        with safe_open(file, framework="pt") as stream:
            names = list(stream.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"LoRA file {file} cannot be read: {brief(error)}") from error
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in names):
        raise ModelError(f"LoRA file {file} is a DoRA; only plain LoRA can be converted")


def read_lora(file: Path, pipeline: Any, part: str, config: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return a LoRA file's tensors under diffusers' names, and its peft settings if any."""
    check_lora_file(file)
    try:
        if not issubclass(pipeline, LoraBaseMixin):
            return load_file(file), None
        read: Any = pipeline.lora_state_dict
        state, *more = read(str(file), unet_config=config, return_alphas=True, return_lora_metadata=True)
    except (OSError, KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelError(f"LoRA file {file} cannot be read: {brief(error)}") from error
    alphas = dict(more[0] or {}) if len(more) > 1 else {}
    scaled = {name: _scaled(name, tensor, alphas) for name, tensor in state.items()}
    damaged = [name for name, tensor in scaled.items() if not bool(torch.isfinite(tensor.float()).all())]
    if damaged:
        raise ModelError(f"LoRA file {file}: {damaged[0]} contains NaN or infinite values; the file is damaged")
    if alphas:
        raise ModelError(f"LoRA file {file}: '{min(alphas)}' belongs to no weight")
    inside = {name.removeprefix(f"{part}."): t for name, t in scaled.items() if name.startswith(f"{part}.")}
    if inside and not any("lora_A" in name for name in inside):
        inside = convert_unet_state_dict_to_peft(inside)
    outside = {name: tensor for name, tensor in scaled.items() if not name.startswith(f"{part}.")}
    return {**{f"{part}.{name}": tensor for name, tensor in inside.items()}, **outside}, more[-1]


def _scaled(name: str, tensor: Tensor, alphas: dict[str, float]) -> Tensor:
    """Multiply alpha / rank into a LoRA's B matrix, so that the saved file needs no alpha.

    A matrices are returned unchanged. The alpha that was used is removed from `alphas`.
    """
    match = UP.search(name)
    if match is None:
        return tensor
    layer, down = name[: match.start()].rstrip("."), name.replace("lora_B", "lora_A").replace("up.", "down.")
    for key in (f"{layer}.alpha", f"{down}.alpha"):
        if key in alphas:
            return tensor * (float(alphas.pop(key)) / tensor.shape[1])
    return tensor
