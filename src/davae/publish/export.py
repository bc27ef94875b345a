"""A finished run as a fused pipeline, a pipeline with a LoRA file, or a small upgrade."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.utils import get_peft_model_state_dict

import davae
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import denoiser, family_by_class, family_of
from davae.errors import ModelError
from davae.files.atomic import model_folder
from davae.files.ownership import check_out
from davae.files.reading import load_json, recipe_file
from davae.pretrained.autoencoders import load_autoencoder, load_detail_vae
from davae.pretrained.open import load_part, load_pipeline, read_config
from davae.pretrained.shapes import read_shapes
from davae.publish.assemble import (
    UPGRADE_FILE,
    VAE_FOLDER,
    apply_upgrade,
    assemble,
    check_fit,
    file_shapes,
    read_metadata,
    trained_transformer,
    without_lora,
)
from davae.publish.card import Origin, write_card
from davae.publish.changes import BITS, check_changes
from davae.publish.report_file import read_report
from davae.publish.standalone import home_module, standalone_source
from davae.publish.upgrade_file import UpgradeFile, check_base_autoencoder, write_upgrade
from davae.recipes import Recipe, load_recipe
from davae.train.locking import base_home
from davae.train.run_folder import is_done, was_done
from davae.zoo import resolve

logger = logging.getLogger(__name__)

Kind = Literal["fused", "lora", "upgrade"]


@dataclass(frozen=True)
class FinishedRun:
    """A run folder whose stage 2 is done."""

    folder: Path
    recipe: Recipe

    @property
    def pipeline(self) -> Path:
        return self.folder / "pipeline"

    def base(self) -> str:
        """Return the pretrained model: a folder or a hub id."""
        model = self.recipe.base.model
        return str(base_home(self.folder) / "base" / "pipeline") if model is None else resolve(model)


def open_run(folder: Path) -> FinishedRun:
    """Open a finished run.

    Raises:
        ModelError: not a finished run.
    """
    recipe = load_recipe(str(recipe_file(folder, "give the --out of a finished `davae upgrade`")))
    if not isinstance(recipe, Recipe):
        raise ModelError(
            f"{folder} holds a run of '{recipe.name}', which upgrades nothing; only upgrades are exported"
        )
    if not ((folder / UPGRADE_FILE).is_file() and (folder / "pipeline" / "model_index.json").is_file()):
        raise ModelError(
            f"run {folder} has no {UPGRADE_FILE} and pipeline/; run its `davae upgrade` command to the end"
        )
    if any((folder / "checkpoints").glob("*stage2-*")) and not was_done(folder, "stage2"):
        raise ModelError(
            f"run {folder} is not finished: its upgrade and its pipeline may be of two trainings; run its command to the end"
        )
    return FinishedRun(folder, recipe)


def export(
    folder: Path,
    out: Path,
    kind: Kind,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    self_contained: bool = False,
    base_decoder: bool = False,
    rank: int | None = None,
    bits: int | None = None,
) -> Path:
    """Write a finished run to `out`, weights in `dtype`, with a model card, and return `out`.

    Args:
        kind: `fused`, the pipeline with everything folded in; `lora`, the pipeline with P, P', O and O' but without LoRA, and
            LoRA as `pytorch_lora_weights.safetensors`; `upgrade`, the DetailVAE and what stage 2 trained, without the base.
        base: the pretrained model, where it is not at the place in the recipe; `lora` reads its weights.
        self_contained: bring along the code of davae's classes, so that the pipeline loads without davae.
        base_decoder: bring along the base's own decoder, for previews (`davae.preview`).
        rank: of an `upgrade` whose run trained every weight: store the changes of matrices at this rank.
        bits: likewise, store each change in 8 bits.

    Raises:
        ModelError: an unfinished run, a kind that this model cannot have, or a rank or bits for a LoRA.
        RunError: `out` holds anything but an earlier export.
    """
    run = open_run(folder)
    base = run.base() if base is None else resolve(base)
    check_out(out, (folder, base))
    if self_contained and kind == "upgrade":
        raise ModelError("--self-contained is for whole pipelines; use it with --as fused or --as lora")
    if base_decoder and kind == "upgrade":
        raise ModelError(
            "--base-decoder is for whole pipelines; use it with --as fused or --as lora, or with `davae apply`"
        )
    small = _checked_size(run, kind, rank, bits)
    origin = Origin(base, kind, self_contained, run.recipe, _report(run.folder, run.recipe))
    if kind == "upgrade":
        pretrained = _pretrained(run, base) if small else None
        with model_folder(out) as partial:
            vae = load_detail_vae(run.pipeline / "vae", dtype)
            vae.register_to_config(_name_or_path="")  # the run's path means nothing elsewhere
            vae.save_pretrained(partial / VAE_FOLDER)
            changes = write_upgrade(run.folder / UPGRADE_FILE, partial, dtype, pretrained, rank)
            write_card(
                partial, replace(origin, changes=changes), read_config(str(run.pipeline), "", "model_index.json")
            )
        return out
    lora: dict[str, Any] = {}
    if kind == "fused":
        pipeline = load_pipeline(str(run.pipeline), dtype)
    else:
        _check_lora(run)
        pipeline, lora = _with_lora(run, base, dtype)
    if base_decoder:
        pipeline.vae.attach_base_decoder(load_autoencoder(base))
    _save(pipeline, out, origin, lora)
    return out


def apply(
    upgrade: UpgradeFile,
    base: str,
    out: Path,
    dtype: torch.dtype,
    *,
    self_contained: bool = False,
    base_decoder: bool = False,
) -> Path:
    """Put an upgrade onto a pretrained model with LoRA folded in, and return `out`.

    Args:
        base_decoder: bring along the base's own decoder, for previews.

    Raises:
        ModelError: a base of another class, number of channels, shapes or autoencoder than the upgrade was trained on.
        RunError: `out` holds anything but what davae wrote.
    """
    base = resolve(base)
    check_out(out, (upgrade.file, upgrade.vae, base))
    shapes = read_shapes(base)  # an error comes before any weight is read
    channels, _ = upgrade.channels
    if (shapes.transformer_class, shapes.channels) != (upgrade.class_name, channels):
        raise ModelError(
            f"{upgrade.file} upgrades a {upgrade.class_name} of {channels} channels, {base} has a {shapes.transformer_class} "
            f"of {shapes.channels}"
        )
    check_fit(upgrade.file, shapes.transformer_class, shapes.transformer_config)
    pipeline = load_pipeline(base, dtype)
    full: Any = load_detail_vae(upgrade.vae)
    check_base_autoencoder(full, pipeline.vae.float(), base)
    transformer = apply_upgrade(denoiser(pipeline), upgrade.file)
    vae: Any = load_detail_vae(upgrade.vae, dtype)
    if base_decoder:
        vae.attach_base_decoder(pipeline.vae)
    _save(assemble(pipeline, vae, transformer), out, Origin(base, "fused", self_contained), {})
    return out


def _report(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the figures of a run's report, None without one on its present weights."""
    file = folder / "report.json"
    if not file.is_file():
        return None
    if was_done(folder, "report") and not is_done(folder, recipe, "report"):
        logger.warning(
            "%s is about other weights; the card carries no figures until `davae upgrade` is run again", file
        )
        return None
    return read_report(folder)


def _checked_size(run: FinishedRun, kind: Kind, rank: int | None, bits: int | None) -> bool:
    """Return whether the changes of a full training are to be stored, at a rank or in bits.

    Raises:
        ModelError: both, other bits than 8, or a run or a kind that cannot be stored so.
    """
    given = [("--rank", rank), ("--bits", bits)]
    names = [name for name, value in given if value is not None]
    if not names:
        return False
    if len(names) == 2:
        raise ModelError("--rank and --bits are two ways to store the same changes; give one of them")
    if bits not in (None, BITS):
        raise ModelError(f"--bits {bits}: changes are stored in {BITS} bits; use --bits {BITS}, or a --rank for less")
    if kind != "upgrade":
        raise ModelError(
            f"{names[0]} is for an upgrade without its base; use it with --as upgrade, not with --as {kind}"
        )
    if (lora := run.recipe.stage2.lora) is not None:
        raise ModelError(
            f"run {run.folder} trained a LoRA of rank {lora.rank}, which is stored as it is; leave {names[0]} out"
        )
    file = run.folder / UPGRADE_FILE
    family = family_by_class(read_metadata(file)["class"])  # a damaged file ends here
    check_changes(file_shapes(file), rank, family)
    return True


def _pretrained(run: FinishedRun, base: str) -> torch.nn.Module:
    """Return the base's transformer alone.

    Raises:
        ModelError: another model than the run's base.
    """
    file = run.folder / UPGRADE_FILE
    name = read_metadata(file)["class"]
    shapes = read_shapes(base)
    if shapes.transformer_class != name:
        raise ModelError(f"{file} upgrades a {name}, and {base} has another model; give the run's base")
    check_fit(file, name, shapes.transformer_config)
    return load_part(base, family_by_class(name).component, name)


def _check_lora(run: FinishedRun) -> None:
    """ModelError unless the run trained LoRA, for a pipeline that loads LoRA files."""
    if run.recipe.stage2.lora is None:
        raise ModelError(f"run {run.folder} trained every weight, it has no LoRA; use --as fused or --as upgrade")
    pipeline = read_config(str(run.pipeline), "", "model_index.json")["_class_name"]
    if not loads_lora(pipeline, read_metadata(run.folder / UPGRADE_FILE)["class"]):
        raise ModelError(f"{pipeline} cannot load LoRA files; use --as fused (LoRA folded in) or --as upgrade")


def loads_lora(pipeline: str, model: str) -> bool:
    """Return whether diffusers can load a LoRA into this pipeline and this model."""
    return issubclass(model_class(pipeline), LoraBaseMixin) and hasattr(model_class(model), "load_lora_adapter")


def _with_lora(run: FinishedRun, base: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return the upgraded pipeline without LoRA, and LoRA as `save_lora_weights` takes it."""
    pipeline = load_pipeline(base, dtype)
    file, network = run.folder / UPGRADE_FILE, denoiser(pipeline)
    check_fit(file, type(network).__name__, network.config)
    component = family_of(network).component
    transformer: Any = trained_transformer(network, file)
    lora = lora_layers(transformer, component, dtype)
    vae: Any = load_detail_vae(run.pipeline / "vae", dtype)
    return assemble(pipeline, vae, without_lora(transformer)), lora


def lora_layers(transformer: Any, component: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return an attached LoRA and its settings as arguments of `save_lora_weights`."""
    tensors = get_peft_model_state_dict(transformer)
    return {
        f"{component}_lora_layers": {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        f"{component}_lora_adapter_metadata": transformer.peft_config["default"].to_dict(),
    }


def _save(pipeline: Any, out: Path, origin: Origin, lora: dict[str, Any]) -> None:
    """Write the whole folder, which appears once it is complete."""
    for part in (pipeline, *pipeline.components.values()):
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path="")  # paths of this machine mean nothing elsewhere
    with model_folder(out) as partial:
        pipeline.save_pretrained(partial)
        if lora:
            pipeline.save_lora_weights(partial, **lora)
        index = read_config(str(partial), "", "model_index.json")
        _load_all_parts_alike(partial, index)
        if origin.self_contained:
            _bring_code(partial, index)
        write_card(partial, origin, index)


def _load_all_parts_alike(folder: Path, index: dict[str, Any]) -> None:
    """Have text encoders load as float32 by default, as diffusers' own models do.

    transformers follows its config instead: a half-precision pipeline would not run as `from_pretrained` loads it.
    """
    for part, entry in index.items():
        file = folder / part / "config.json"
        if isinstance(entry, list) and entry[0] == "transformers" and file.is_file():
            config = load_json(file.read_text(encoding="utf-8"))
            if "dtype" in config:
                file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _bring_code(folder: Path, index: dict[str, Any]) -> None:
    """Write the code of davae's classes next to their weights, and name it in the index."""
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] == davae.__name__:
            index[part] = [home_module(entry[1]), entry[1]]
            (folder / part / f"{home_module(entry[1])}.py").write_text(standalone_source(entry[1]), encoding="utf-8")
    name = index["_class_name"]
    if not hasattr(diffusers, name):
        index["_class_name"] = ["pipeline", name]
        (folder / "pipeline.py").write_text(standalone_source(name), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
