"""Results of stage 2: a small upgrade file, and a stock diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.backbones.classes import label_names
from davae.backbones.classes_by_name import model_class
from davae.backbones.detail_time import OFFSET
from davae.backbones.expand import CLEAN_BASE, MARK, expand_transformer, latent_channels
from davae.backbones.families import denoiser, family_by_class, family_of
from davae.backbones.head_options import HeadOptions, attach_head, check_family, in_precision, upgrade_tensors
from davae.backbones.trainable import choose_trainable
from davae.errors import ModelError
from davae.files.atomic import model_folder, save_tensors
from davae.files.checksums import check_tensor_sums
from davae.files.reading import parse_json
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.open import load_pipeline
from davae.pretrained.stored import planned
from davae.publish.changes import (
    KEYS,
    ROUNDED,
    Changes,
    Shapes,
    compare_base,
    read_changes,
    stored_shapes,
    trained_value,
)
from davae.recipes import Recipe
from davae.recipes.sections import Lora
from davae.vae.detail_vae import DetailVAE

UPGRADE_FILE = "upgrade.safetensors"
VAE_FOLDER = "vae"  # next to the upgrade file
POLISHED = "polished"  # instead of it in a run folder: the DetailVAE after stage1.polish
FORMAT = "davae-upgrade-1"
REMEDY = "copy or export it again"
MOST_CHANNELS = 65_536
SHARES = ("clean_base", "detail_scale")  # numbers below 1 in the metadata, left out at their defaults


def save_upgrade(
    transformer: nn.Module,
    path: Path,
    lora: Lora | None,
    dtype: torch.dtype,
    tensors: dict[str, Tensor] | None = None,
    vae_folder: str = VAE_FOLDER,
    detail_scale: float = 1.0,
) -> None:
    """Write everything that stage 2 trained as one safetensors file, atomically.

    Args:
        tensors: `upgrade_tensors` by name where `transformer` does not hold them itself.
        vae_folder: of the DetailVAE, next to the file.
        detail_scale: std to which that DetailVAE normalises the detail.
    """
    tensors = in_precision(upgrade_tensors(transformer) if tensors is None else tensors, dtype)
    config: Any = transformer.config
    metadata = {
        "format": FORMAT,
        "class": type(transformer).__name__,
        "channels": json.dumps([config[MARK], latent_channels(transformer)]),
        "lora": json.dumps(None if lora is None else lora_values(lora)),
    }
    if vae_folder != VAE_FOLDER:
        metadata["vae"] = json.dumps({"id": None, "path": vae_folder})
    if config.get(CLEAN_BASE):
        metadata["clean_base"] = json.dumps(config[CLEAN_BASE])
    if detail_scale != 1.0:
        metadata["detail_scale"] = json.dumps(detail_scale)
    if config.get(OFFSET):
        metadata["detail_offset"] = json.dumps(config[OFFSET])
    if head := config.get("head_options"):
        metadata["detail_head"] = json.dumps({key: value for key, value in head.items() if key != "base_channels"})
    save_tensors(path, tensors, metadata)


def lora_values(lora: Lora) -> dict[str, Any]:
    """Return the settings of LoRA as an upgrade file keeps them, readable by earlier versions."""
    unused = {name for name in ("extra_targets", "train_norms") if not getattr(lora, name)}
    return lora.model_dump(mode="json", exclude=unused)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an upgrade file, without its tensors.

    Raises:
        ModelError: not an upgrade file.
    """
    if not path.is_file():
        raise ModelError(f"upgrade file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"upgrade file {path} is damaged ({error}); copy or download it again") from error
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path} is not a davae upgrade file")
    check_tensor_sums(path, {}, metadata, ModelError, REMEDY)
    read_details(path, metadata)
    return metadata


@dataclass(frozen=True)
class Details:
    """Content of an upgrade file's metadata.

    Attributes:
        class_name: class of the transformer.
        base_channels, channels: C and C+D.
        lora: its rank and alpha; None where every weight was trained.
        changes: how the changes of a full training are stored; None where the file has the weights.
        vae_id, vae_path: content and folder of its DetailVAE, where the file names one.
        clean_base: share of its training with a clean base.
        detail_scale: std of the normalised detail.
        detail_offset: how far the base is ahead of the detail in sampling; 0 where they share one time.
        head: options of its detail head.
    """

    class_name: str
    base_channels: int
    channels: int
    lora: Lora | None
    vae_id: str | None
    vae_path: str | None
    clean_base: float = 0.0
    detail_scale: float = 1.0
    detail_offset: float = 0.0
    head: HeadOptions = field(default_factory=HeadOptions)
    changes: Changes | None = None

    @property
    def detail_channels(self) -> int:
        """D."""
        return self.channels - self.base_channels

    @property
    def vae_folder(self) -> str:
        """Folder of its DetailVAE. A run's own file and those of davae 0.1 may name none."""
        return self.vae_path or VAE_FOLDER


def read_details(path: Path, metadata: dict[str, str]) -> Details:
    """Read the metadata of an upgrade file.

    Raises:
        ModelError: an entry that is missing or is not what davae writes there.
    """
    values = {
        key: parse_json(metadata[key], f"upgrade file {path}, {key}") if key in metadata else None
        for key in ("channels", "lora", "vae", *SHARES, "detail_offset", "detail_head", *KEYS)
    }
    channels, lora, vae = values["channels"], values["lora"], values["vae"]
    numbers = channels if isinstance(channels, list) and all(type(one) is int for one in channels) else []
    if len(numbers) != 2 or not 0 < numbers[0] < numbers[1] <= MOST_CHANNELS:
        raise ModelError(f"upgrade file {path}: channels are {str(channels)[:80]}, expected [C, C+D]; it is damaged")
    try:
        rank = None if lora is None else Lora.model_validate(lora)
    except ValidationError as error:
        raise ModelError(f"upgrade file {path}: lora is {str(lora)[:80]}; it is damaged") from error
    if vae is not None:
        place = vae.get("path") if isinstance(vae, dict) else None
        if not isinstance(place, str) or "\0" in place or Path(place).is_absolute() or ".." in Path(place).parts:
            raise ModelError(f"upgrade file {path}: {str(place)[:80]!r} is not a folder next to it; it is damaged")
    try:
        family = family_by_class(metadata.get("class", ""))
    except ValueError as error:
        raise ModelError(f"upgrade file {path}: {error}") from error
    try:
        head = HeadOptions() if values["detail_head"] is None else HeadOptions.read(values["detail_head"])
        check_family(family, head)
    except ValueError as error:
        raise ModelError(f"upgrade file {path}: {error}; it is damaged") from error
    for key in SHARES:
        if not (isinstance(share := values[key] or 0.0, float) and 0.0 <= share < 1.0):
            raise ModelError(f"upgrade file {path}: {key} is {str(share)[:80]}, expected a share; it is damaged")
    offset = values["detail_offset"] or 0.0
    if not (isinstance(offset, float) and 0.0 <= offset < 1.0) or (offset and family.detail_time is None):
        raise ModelError(
            f"upgrade file {path}: detail_offset of a {family.class_name} is {str(offset)[:80]}; it is damaged"
        )
    try:
        stored = [read_changes(key, values[key]) for key in KEYS if values[key] is not None]
    except ValueError as error:
        raise ModelError(f"upgrade file {path}: {error}; it is damaged") from error
    if len(stored) + (rank is not None) > 1:
        raise ModelError(f"upgrade file {path}: its weights are stored in two ways; it is damaged")
    own = (vae or {}).get("id"), (vae or {}).get("path"), values["clean_base"] or 0.0, values["detail_scale"] or 1.0
    return Details(metadata["class"], numbers[0], numbers[1], rank, *own, offset, head, *stored)


def read_upgrade(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return (metadata, tensors) of an upgrade file.

    Raises:
        ModelError: not an upgrade file, or weights that are damaged or not finite.
    """
    metadata, tensors = read_metadata(path), load_file(path)
    check_tensor_sums(path, tensors, metadata, ModelError, REMEDY)
    for name, tensor in tensors.items():
        whole = tensor.dtype is torch.int8 and name.endswith(ROUNDED)
        if not (whole or (tensor.is_floating_point() and bool(torch.isfinite(tensor).all()))):
            raise ModelError(f"upgrade file {path}: {name} has values that are not finite numbers; it is damaged")
    return metadata, tensors


def file_shapes(path: Path) -> Shapes:
    """Return names and shapes of an upgrade file's tensors, from its header."""
    with safe_open(path, framework="pt") as stream:
        return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118


def check_fit(path: Path, class_name: str, config: Any) -> None:
    """Compare an upgrade file's header with the expanded transformer, without its weights.

    Args:
        class_name, config: of the transformer.

    Raises:
        ModelError: not an upgrade file, or one for another transformer, D or LoRA rank.
    """
    details = read_details(path, read_metadata(path))
    family = family_by_class(class_name)
    channels = int(config[family.in_key]) // family.packed
    if (details.class_name, details.base_channels) != (class_name, channels):
        raise ModelError(
            f"{path} upgrades a {details.class_name} of {details.base_channels} channels, "
            f"this is a {class_name} of {channels}"
        )
    shapes = file_shapes(path)
    with planned(f"the transformer of {path}"):
        empty = model_class(class_name).from_config(config)
        expanded = expand_transformer(empty, details.detail_channels, detail_offset=details.detail_offset)
        attach_head(expanded, details.head)
        choose_trainable(expanded, details.lora)
        _compare(path, shapes, _needed(expanded, details))


def _needed(transformer: nn.Module, details: Details) -> Shapes:
    """Return names and shapes of the tensors of an upgrade file for an expanded transformer."""
    trained = {name: tuple(tensor.shape) for name, tensor in upgrade_tensors(transformer).items()}
    return stored_shapes(trained, details.changes, family_of(transformer))


def _compare(path: Path, found: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]) -> None:
    """Refuse an upgrade file whose tensors are not the trained ones."""
    if found.keys() != needed.keys():
        odd = sorted(found.keys() ^ needed.keys())[0]
        raise ModelError(f"{path} does not fit this transformer: '{odd}' is in only one of them")
    for name, shape in needed.items():
        if found[name] != shape:
            raise ModelError(
                f"{path} does not fit this transformer: '{name}' has shape {found[name]}, needed is {shape}"
            )


def apply_upgrade(transformer: nn.Module, path: Path) -> nn.Module:
    """Return an expanded copy of a pretrained transformer with an upgrade file's LoRA fused."""
    return fuse(trained_transformer(transformer, path))


def trained_transformer(transformer: nn.Module, path: Path) -> nn.Module:
    """Return an expanded copy of a pretrained transformer with an upgrade file's LoRA attached.

    Raises:
        ModelError: not an upgrade file, or tensors of other shapes; `check_fit` names another class or C before.
    """
    details = read_details(path, read_metadata(path))
    expanded = expand_transformer(transformer, details.detail_channels, detail_offset=details.detail_offset)
    if details.clean_base:
        cast(Any, expanded).register_to_config(**{CLEAN_BASE: details.clean_base})
    attach_head(expanded, details.head)
    choose_trainable(expanded, details.lora)
    load_trained(expanded, path)
    return expanded


def load_trained(transformer: nn.Module, path: Path) -> None:
    """Copy an upgrade file into an expanded transformer: what is trained, and its detail head.

    The transformer still has its pretrained values, to which stored changes are added.

    Raises:
        ModelError: not an upgrade file, or one whose parameters are not these (another model, D, or LoRA rank).
    """
    metadata, tensors = read_upgrade(path)
    own = upgrade_tensors(transformer)
    details = read_details(path, metadata)
    _compare(path, {n: tuple(t.shape) for n, t in tensors.items()}, _needed(transformer, details))
    if details.changes is not None:
        compare_base(path, details.changes, own, family_of(transformer))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trained_value(name, tensors, parameter))


def fuse(transformer: nn.Module) -> nn.Module:
    """Fold LoRA into copies of the weights, and remove it."""
    for module in adapted_layers(transformer):
        layer: Any = module.get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        module.merge()
    return without_lora(transformer)


def without_lora(transformer: nn.Module) -> nn.Module:
    """Remove LoRA, folded in or not, and every trace of peft."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            transformer.set_submodule(name, module.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    return transformer.requires_grad_(False).eval()


def adapted_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


def assemble(pipeline: Any, vae: DetailVAE, transformer: nn.Module) -> Any:
    """Return the base's pipeline class around the upgraded parts and the base's other parts.

    Where the stock class cannot draw an upgrade by default, its family's row names davae's subclass to take; sizes in pixels
    that the row names are multiplied by s.
    """
    family, scale = family_of(transformer), vae.layout.scale
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


def export_upgraded(
    model: str, vae: DetailVAE, trained: dict[str, Tensor], recipe: Recipe, file: Path, target: Path
) -> None:
    """Write the upgrade file, and the pipeline in the precision of `export.dtype`.

    Args:
        model: the base's folder or hub id.
        vae: the autoencoder of stage 1, polished where the recipe has `stage1.polish`.
        trained: what stage 2 leaves, the `upgrade_tensors` by name.
        recipe: the run's recipe.
        file: the upgrade file.
        target: the pipeline's folder.
    """
    base = load_pipeline(model)
    pretrained = denoiser(base)
    expanded = expand_transformer(pretrained, recipe.detail_channels, detail_offset=recipe.stage2.detail_offset)
    if recipe.stage2.clean_base:
        expanded.register_to_config(**{CLEAN_BASE: recipe.stage2.clean_base})
    attach_head(expanded, HeadOptions.of(recipe.stage2))
    own = VAE_FOLDER if recipe.stage1.polish is None else POLISHED, recipe.stage2.detail_scale
    save_upgrade(expanded, file, recipe.stage2.lora, torch.float32, trained, *own)
    upgraded = assemble(base, vae, apply_upgrade(pretrained, file))
    if recipe.export.dtype != "float32":
        upgraded.to(dtype=getattr(torch, recipe.export.dtype))
    save_pipeline(upgraded, target)


def load_upgraded(pipeline: Any, folder: Path) -> Any:
    """Return the upgrade of a base pipeline by a folder with `vae/` and an upgrade file."""
    vae = load_detail_vae(folder / "vae", pipeline.vae.dtype).to(pipeline.vae.device)
    transformer = denoiser(pipeline)
    check_fit(folder / UPGRADE_FILE, type(transformer).__name__, transformer.config)
    return assemble(pipeline, vae, apply_upgrade(transformer, folder / UPGRADE_FILE))
