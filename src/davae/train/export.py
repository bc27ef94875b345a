"""What a finished stage 2 leaves behind: a small upgrade file, and a stock diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from davae.models.detail_vae import DetailVAE
from davae.models.expand import MARK, expand_transformer, latent_channels
from davae.models.pipeline import ModelError
from davae.recipes.schema import Lora
from davae.train.stage2 import choose_trainable
from davae.train.state import new_folder, saving

UPGRADE_FILE = "upgrade.safetensors"
FORMAT = "davae-upgrade-1"


def save_upgrade(
    transformer: nn.Module,
    path: Path,
    lora: Lora | None,
    dtype: torch.dtype,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Everything stage 2 trained (P', O', changed P, O, LoRA or all), as one safetensors file, written atomically.

    Args:
        tensors: the trained parameters by name where `transformer` does not hold them itself.
    """
    if tensors is None:
        tensors = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    config: Any = transformer.config
    metadata = {
        "format": FORMAT,
        "class": type(transformer).__name__,
        "channels": json.dumps([config[MARK], latent_channels(transformer)]),
        "lora": json.dumps(None if lora is None else lora.model_dump()),
    }
    partial = path.with_name(f".{path.name}.partial")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(path)


def read_metadata(path: Path) -> dict[str, str]:
    """What an upgrade file says of itself, without its tensors; ModelError when it is none."""
    if not path.is_file():
        raise ModelError(f"upgrade file {path} does not exist")
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path} is not a davae upgrade file")
    return metadata


def read_upgrade(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of an upgrade file; ModelError when it is none."""
    return read_metadata(path), load_file(path)


def apply_upgrade(transformer: nn.Module, path: Path) -> nn.Module:
    """Pretrained transformer + upgrade file -> expanded transformer with LoRA fused; the input stays as it was.

    Raises:
        ModelError: not an upgrade file, or one for another transformer.
    """
    metadata = read_metadata(path)
    base_channels, channels = json.loads(metadata["channels"])
    if metadata["class"] != type(transformer).__name__ or latent_channels(transformer) != base_channels:
        raise ModelError(
            f"{path} upgrades a {metadata['class']} of {base_channels} channels, "
            f"this is a {type(transformer).__name__} of {latent_channels(transformer)}"
        )
    lora = json.loads(metadata["lora"])
    expanded = expand_transformer(transformer, channels - base_channels)
    choose_trainable(expanded, None if lora is None else Lora(**lora))
    load_trained(expanded, path)
    return fuse(expanded)


def load_trained(transformer: nn.Module, path: Path) -> None:
    """Copy an upgrade file into the trainable parameters of an expanded transformer.

    Raises:
        ModelError: not an upgrade file, or one whose parameters are not these (another model, D, or LoRA rank).
    """
    _, tensors = read_upgrade(path)
    own = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise ModelError(f"{path} does not fit this transformer: '{odd}' stands in only one of them")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(
                f"{path} does not fit this transformer: '{name}' has shape {tuple(tensors[name].shape)}, "
                f"needed is {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def fuse(transformer: nn.Module) -> nn.Module:
    """Fold LoRA into the weights and remove it; weights shared with the pretrained transformer are copied first."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            module.merge()
            transformer.set_submodule(name, layer)
    return transformer.requires_grad_(False).eval()


def assemble(pipeline: Any, vae: DetailVAE, transformer: nn.Module) -> Any:
    """The base's own pipeline class around the upgraded parts; scheduler and text encoders are the base's."""
    components = {**pipeline.components, "vae": vae.eval(), "transformer": transformer}
    options = {
        name: pipeline.config[name]
        for name in inspect.signature(type(pipeline).__init__).parameters
        if name not in components and name in pipeline.config
    }
    upgraded = type(pipeline)(**components, **options)
    upgraded.set_progress_bar_config(disable=True)
    return upgraded


def save_pipeline(pipeline: Any, path: Path) -> None:
    """Write a diffusers folder that appears only once it is whole."""
    with new_folder(path) as partial:
        pipeline.save_pretrained(partial)


def export_upgrade(run: Path, out: Path, dtype: torch.dtype) -> Path:
    """A finished run's upgrade without its base: `vae/` and the upgrade file, in `dtype`; returns `out`.

    Raises:
        ModelError: when the run did not finish stage 2.
    """
    source = run / UPGRADE_FILE
    if not source.is_file():
        raise ModelError(f"run {run} has no {UPGRADE_FILE}; run its `davae upgrade` command to the end")
    metadata, tensors = read_upgrade(source)
    with new_folder(out) as partial:
        vae = DetailVAE.from_pretrained(run / "vae", torch_dtype=dtype)
        vae.register_to_config(_name_or_path="")  # the run's path means nothing elsewhere
        vae.save_pretrained(partial / "vae")
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, partial / UPGRADE_FILE, metadata)
    return out


def load_upgraded(pipeline: Any, folder: Path) -> Any:
    """A base pipeline + a folder with `vae/` and an upgrade file -> the upgraded pipeline."""
    vae = DetailVAE.from_pretrained(folder / "vae", torch_dtype=pipeline.vae.dtype)
    return assemble(pipeline, vae, apply_upgrade(pipeline.transformer, folder / UPGRADE_FILE))
