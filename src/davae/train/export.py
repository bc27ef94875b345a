"""What a finished stage 2 leaves behind: a small upgrade file, and a stock diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.checksums import check_tensors
from davae.files import model_folder, save_tensors
from davae.models.autoencoders import load_detail_vae
from davae.models.classes import label_names
from davae.models.detail_vae import DetailVAE
from davae.models.expand import MARK, expand_transformer, latent_channels
from davae.models.families import model_class, transformer_family
from davae.models.pipeline import ModelError, denoiser
from davae.recipes.sections import Lora
from davae.train.stage2 import choose_trainable

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
    tensors = {name: tensor.detach().to(dtype=dtype) for name, tensor in tensors.items()}
    config: Any = transformer.config
    metadata = {
        "format": FORMAT,
        "class": type(transformer).__name__,
        "channels": json.dumps([config[MARK], latent_channels(transformer)]),
        "lora": json.dumps(None if lora is None else lora_values(lora)),
    }
    save_tensors(path, tensors, metadata)


def lora_values(lora: Lora) -> dict[str, Any]:
    """Return the settings of LoRA as an upgrade file keeps them: earlier versions read those without further targets."""
    return lora.model_dump(mode="json", exclude=None if lora.extra_targets else {"extra_targets"})


def read_metadata(path: Path) -> dict[str, str]:
    """What an upgrade file says of itself, without its tensors; ModelError when it is none."""
    if not path.is_file():
        raise ModelError(f"upgrade file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"upgrade file {path} is damaged ({error}); copy or download it again") from error
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path} is not a davae upgrade file")
    return metadata


def read_upgrade(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of an upgrade file; ModelError when it is none."""
    metadata, tensors = read_metadata(path), load_file(path)
    check_tensors(path, tensors, metadata, ModelError, "copy or export it again")
    return metadata, tensors


def apply_upgrade(transformer: nn.Module, path: Path) -> nn.Module:
    """Pretrained transformer + upgrade file -> expanded transformer with LoRA fused; the input stays as it was."""
    return fuse(trained_transformer(transformer, path))


def trained_transformer(transformer: nn.Module, path: Path) -> nn.Module:
    """Pretrained transformer + upgrade file -> expanded transformer with its LoRA attached; the input stays as it was.

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
    return expanded


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
    for module in adapted_layers(transformer):
        layer: Any = module.get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        module.merge()
    return without_lora(transformer)


def without_lora(transformer: nn.Module) -> nn.Module:
    """Remove LoRA, folded in or not, and every trace of peft; ready to sample."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            transformer.set_submodule(name, module.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    return transformer.requires_grad_(False).eval()


def adapted_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


def assemble(pipeline: Any, vae: DetailVAE, transformer: nn.Module) -> Any:
    """The base's own pipeline class around the upgraded parts; scheduler and text encoders are the base's.

    Where the stock class cannot draw an upgrade by default, its family's row names davae's subclass to take; sizes in pixels
    that the row names are multiplied by s.
    """
    family, scale = transformer_family(type(transformer).__name__), vae.layout.scale
    subclasses = [model_class(name) for name in family.upgraded_pipelines]
    kind = next((c for c in subclasses if issubclass(c, type(pipeline))), type(pipeline))
    config: Any = transformer.config
    sizes = {key: config[key] * scale for key in family.scaled_config if config[key] is not None}
    transformer.register_to_config(**sizes)  # type: ignore[operator]
    components = {**pipeline.components, "vae": vae.eval(), family.component: transformer}
    parameters = inspect.signature(type(pipeline).__init__).parameters
    options = {
        name: pipeline.config[name] for name in parameters if name not in components and name in pipeline.config
    }
    options |= {name: options[name] * scale for name in family.scaled_options}
    if "id2label" in parameters:
        options["id2label"] = label_names(pipeline)
    upgraded = kind(**components, **options)
    upgraded.register_to_config(**options)  # DiT's pipeline forgets its names when it is saved
    upgraded.set_progress_bar_config(disable=True)
    return upgraded


def save_pipeline(pipeline: Any, path: Path) -> None:
    """Write a diffusers folder that appears only once it is whole."""
    with model_folder(path) as partial:
        pipeline.save_pretrained(partial)


def load_upgraded(pipeline: Any, folder: Path) -> Any:
    """A base pipeline + a folder with `vae/` and an upgrade file -> the upgraded pipeline."""
    vae = load_detail_vae(folder / "vae", pipeline.vae.dtype).to(pipeline.vae.device)
    return assemble(pipeline, vae, apply_upgrade(denoiser(pipeline), folder / UPGRADE_FILE))
