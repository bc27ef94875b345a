"""Load the diffusers pipeline that a run starts from, and read its shapes before anything is built."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from torch import Tensor

from davae.backbones.classes_by_name import model_class
from davae.backbones.expand import MARK
from davae.backbones.families import component_in, denoiser, family_by_class, family_of, supported
from davae.backbones.family import Family
from davae.errors import ModelError
from davae.files.checksums import check_folder
from davae.files.reading import read_object
from davae.homes import HOMES
from davae.pretrained.hub_errors import hub_reason
from davae.pretrained.processors import check_tokenizers
from davae.pretrained.stored import check_config, check_index, load_component, load_components, loading
from davae.vae.base import autoencoder_family, base_channels, spatial_factor
from davae.vae.detail_vae import DetailVAE
from davae.zoo import SHIPPED
from davae.zoo.presets import nearest_presets, presets

LEGACY: dict[tuple[str, Any], str] = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class MissingPart(ModelError):
    """A folder or hub model that exists, without the file that was asked for."""


@dataclass(frozen=True)
class BaseShapes:
    """What an upgrade needs to know of a base pipeline, read from its configs alone."""

    pipeline_class: str
    transformer_class: str
    vae_class: str
    channels: int  # C
    vae_factor: int  # f: pixels per latent position
    patch_size: int  # p: latent positions per token, each way
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]


def fetch_file(model: str, part: str, filename: str) -> Path:
    """One file of a diffusers folder or hub id; ModelError when it is not there."""
    local = Path(model)
    if local.is_dir():
        path = local / part / filename
        if not path.is_file():
            raise MissingPart(f"model {model} has no {Path(part) / filename}: not a diffusers folder")
        return path
    if model in SHIPPED:
        raise ModelError(
            f"model '{model}' is an upgraded model without a folder of its own; give its base, {SHIPPED[model]}, or make a "
            f"folder with `davae apply {model} --base {SHIPPED[model]} --out FOLDER`"
        )
    if not HUB_ID.fullmatch(model):
        near = nearest_presets(model)
        raise ModelError(
            f"model '{model}' is no folder here, no preset and no hub id (ORGANISATION/NAME)"
            f"{'; the nearest presets are ' + ', '.join(near) if near else ''}; `davae inspect` lists the presets"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, filename, subfolder=part or None))
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        raise (MissingPart if absent else ModelError)(
            f"model '{model}' is no folder here, and the hub did not give it: {hub_reason(error, model)}"
        ) from error


def read_config(model: str, part: str, filename: str = "config.json") -> dict[str, Any]:
    """One JSON file of a diffusers folder, hub id or preset; ModelError when it is not there."""
    if not Path(model).is_dir() and model in presets():
        config = presets()[model].config(part, filename)
        if config is None:
            raise MissingPart(f"preset {model} has no {Path(part) / filename}")
        return config
    config = read_object(fetch_file(model, part, filename))
    if filename == "model_index.json":
        check_index(config, model)
    return config


def read_shapes(model: str, *, to_train: bool = True) -> BaseShapes:
    """Shapes of a diffusers folder, hub id or preset.

    Args:
        to_train: refuse a family that can only be expanded.

    Raises:
        ModelError: not a diffusers pipeline, an unsupported class, or a model that was upgraded already.
    """
    with loading(f"model {model}"):
        return _read_shapes(model, to_train)


def _read_shapes(model: str, to_train: bool) -> BaseShapes:
    index = read_config(model, "", "model_index.json")
    part = component_in(index)
    if part is None or "vae" not in index:
        raise ModelError(f"model {model} ({index.get('_class_name')}) has no transformer or U-Net and vae to upgrade")
    vae_class = index["vae"][1]
    transformer, vae = read_config(model, part), read_config(model, "vae")
    check_config(transformer, f"{part} of model {model}")
    check_config(vae, f"vae of model {model}")
    # the official folders of DiT and PixArt name the class they had before it was split
    named = str(index[part][1])
    transformer_class = LEGACY.get((named, transformer.get("norm_type")), named)
    if vae_class == "DetailVAE" or MARK in transformer:
        raise ModelError(f"model {model} was upgraded already; start from its pretrained base")
    try:
        family = family_by_class(transformer_class)
        autoencoder_family(vae_class)
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    if to_train and not family.trains:
        raise ModelError(
            f"model {model}: expand_transformer widens a {transformer_class}, but davae cannot train one yet; "
            f"it can train {', '.join(row.class_name for row in supported() if row.trains)}"
        )
    channels = base_channels(vae, vae_class)
    taken = int(transformer[family.in_key]) // family.packed
    if taken != channels:
        raise ModelError(
            f"model {model}: the transformer takes {taken} channels and the vae gives {channels}; "
            "it was expanded already, or the parts do not belong together"
        )
    return BaseShapes(
        pipeline_class=index["_class_name"],
        transformer_class=transformer_class,
        vae_class=vae_class,
        channels=channels,
        vae_factor=spatial_factor(vae, vae_class),
        patch_size=patch_size(transformer, family),
        transformer_config=transformer,
        vae_config=vae,
    )


def patch_size(config: Any, family: Family) -> int:
    """p: latent positions per token, each way, whether the model or its pipeline packs them."""
    own = 1 if family.patch_key is None else config[family.patch_key]
    side = own if isinstance(own, int) else own[0]  # some list one per axis, or per size that they know
    return side * math.isqrt(family.packed)


def pixel_factor(pipeline: Any) -> int:
    """Pixels per latent position of a pipeline's autoencoder, each way."""
    return spatial_factor(pipeline.vae.config, type(pipeline.vae).__name__)


def token_side(pipeline: Any) -> int:
    """Pixels of an image token of a pipeline's denoiser, each way."""
    model = denoiser(pipeline)
    return pixel_factor(pipeline) * patch_size(model.config, family_of(model))


def default_resolution(pipeline: Any) -> int:
    """Pixels of the picture that a pipeline is made for: those an upgrade was trained on, else its own or its transformer's
    default. A stock pipeline knows the latter alone: an upgrade from another size than the base's own needs `height` and
    `width` there."""
    if isinstance(pipeline.vae, DetailVAE) and pipeline.vae.config.get("resolution"):
        return int(pipeline.vae.config["resolution"])
    model = denoiser(pipeline)
    family = family_of(model)
    if family.default_pixels is not None:
        return family.default_pixels * (pipeline.vae.layout.scale if isinstance(pipeline.vae, DetailVAE) else 1)
    side: Any = getattr(pipeline, "default_sample_size", None) or model.config["sample_size"]
    height = side if isinstance(side, int) else side[0]  # U-Nets may have a rectangle
    if "default_sample_size" in family.scaled_options:
        return height
    factor = pixel_factor(pipeline)
    if "sample_size" in family.scaled_config and isinstance(pipeline.vae, DetailVAE):
        factor //= pipeline.vae.layout.scale  # sample_size was multiplied by s instead
    return height * factor


def load_scheduler(model: str) -> Any:
    """The scheduler of a folder or hub id, built from its config alone; None where the pipeline has none.

    Raises:
        ModelError: a class that diffusers does not have.
    """
    name = (read_config(model, "", "model_index.json").get("scheduler") or (None, None))[1]
    if name is None:
        return None
    try:
        kind = model_class(name)
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    config = read_config(model, "scheduler", "scheduler_config.json")
    with loading(f"scheduler of model {model}"):
        check_config(config, f"scheduler of model {model}")
        return kind.from_config(config)


def load_part(model: str, part: str, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One model of a diffusers folder or hub id, without the rest of the pipeline.

    Raises:
        ModelError: when diffusers cannot load it.
    """
    check_folder(Path(model), part)
    return load_component(model, part, model_class(class_name), dtype)


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, without: tuple[str, ...] = ()) -> Any:
    """The stock diffusers pipeline of a folder or hub id, progress bars off.

    Args:
        without: components that are left out (None in the pipeline), so that they take no memory.

    Raises:
        ModelError: when diffusers cannot load it.
    """
    if model in presets() and not Path(model).is_dir():
        weights = presets()[model].hub or "its official weights, made a folder by `davae convert`"
        raise ModelError(f"model {model} is a preset, configs without weights; give {weights}")
    index = read_config(model, "", "model_index.json")
    name = class_name(index.get("_class_name", "DiffusionPipeline"))
    check_folder(Path(model), without=without)
    what = f"model {model}"
    with loading(what), without_own_code(model, index) as folder:
        kind = model_class(name)
        if not Path(folder).is_dir():
            folder = str(kind.download(model, use_safetensors=True, **dict.fromkeys(without)))
        parts = dict.fromkeys(without) | load_components(Path(folder), model, dtype, without)
        pipeline = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **parts)
    check_tokenizers(pipeline, what)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def class_name(entry: Any) -> str:
    """The class that an entry of a model_index.json names, with or without the module of its code before it."""
    return entry[-1] if isinstance(entry, list) else entry


@contextmanager
def without_own_code(model: str, index: dict[str, Any]) -> Iterator[str]:
    """The model; of a folder that brings davae's code along (`davae export --self-contained`) one in its place that names
    the davae that is here, so that no code is read from it.

    Args:
        index: its model_index.json.

    Raises:
        ModelError: such a model on the hub.
    """
    known = (None, "diffusers", "transformers", "davae")
    own = [k for k, v in index.items() if isinstance(v, list) and v[0] not in known and v[-1] in HOMES]
    if not own:
        yield model
        return
    if not Path(model).is_dir():
        raise ModelError(f"model {model} brings davae's code along; download it, and give its folder")
    here = {k: class_name(index[k]) if k == "_class_name" else ["davae", index[k][-1]] for k in own}
    with tempfile.TemporaryDirectory() as scratch:
        for part in Path(model).iterdir():
            if part.is_dir():
                (Path(scratch) / part.name).symlink_to(Path(os.path.realpath(part)))
        (Path(scratch) / "model_index.json").write_text(json.dumps(index | here), encoding="utf-8")
        yield scratch


def load_text_encoders(model: str, component: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder or hub id without its transformer or U-Net, to embed prompts.

    Args:
        component: the model's name in the pipeline; a stand-in takes its place, as some pipelines ask it for its config
            (the width of an absent T5) or its type while they embed.
        config: its config.

    Raises:
        ModelError: when diffusers cannot load the rest.
    """
    pipeline = load_pipeline(model, dtype, without=(component,))
    setattr(pipeline, component, SimpleNamespace(config=FrozenDict(config), dtype=dtype))
    return pipeline


def silent_t5(pipeline: Any) -> bool:
    """Whether Stable Diffusion 3 gets only zeros from its third text encoder: none there, or one scaled to zero."""
    if not hasattr(pipeline, "text_encoder_3"):
        return False
    encoder = pipeline.text_encoder_3
    return encoder is None or not bool(encoder.encoder.final_layer_norm.weight.any())


def reads_silent_t5(model: str) -> bool:
    """`silent_t5` of a folder or hub id, told from one small tensor: the encoder itself may be huge."""
    index = read_config(model, "", "model_index.json")
    if "text_encoder_3" not in index:
        return False
    if index["text_encoder_3"][1] is None:
        return True
    if Path(model).is_dir():
        folder = Path(model) / "text_encoder_3"
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns="text_encoder_3/*.safetensors")) / "text_encoder_3"
    name = "encoder.final_layer_norm.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            if name in set(stream.keys()):
                return not bool(stream.get_tensor(name).any())
    raise MissingPart(f"model {model}: no file of text_encoder_3 holds {name}")


def text_arguments(pipeline: Any) -> dict[str, Any]:
    """Arguments that keep a prompt short where nothing is lost: one zero token instead of 256."""
    return {"max_sequence_length": 1} if silent_t5(pipeline) else {}


def literal_prompts(pipeline: Any) -> dict[str, Any]:
    """Arguments that keep a pipeline from rewriting prompts by a language model: what is asked for is what is measured."""
    takes = inspect.signature(pipeline.__call__).parameters
    return {name: False for name in ("enable_prompt_rewrite", "use_pe") if name in takes}


def guidance_arguments(pipeline: Any, scale: float, prompts: int) -> dict[str, Any]:
    """Arguments that guide so many prompts by `scale`, as the pipeline counts it, away from the empty prompt.

    A guidance-distilled model is told the scale.
    """
    transformer = denoiser(pipeline)
    family = family_of(transformer)
    if family.guidance == "true_cfg_scale" and transformer.config.get("guidance_embeds"):
        return {"guidance_scale": scale, "true_cfg_scale": 1.0}
    negative = {"negative_prompt": [""] * prompts} if family.negative_prompts and scale > 1 else {}
    return {family.guidance: scale, **negative}


@torch.no_grad()
def embed_captions(pipeline: Any, captions: list[str], transformer_class: str) -> tuple[Tensor, ...]:
    """What the pipeline's text encoders say of captions, one tensor per kind, each (B,...).

    The transformer itself may be left out of the pipeline; its class tells what kinds it takes.
    """
    return family_by_class(transformer_class).require_call().embed(pipeline, captions, text_arguments(pipeline))
