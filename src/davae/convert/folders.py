"""What `davae convert` does: official files in, diffusers folders out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

import davae
from davae.backbones.families.rows import model_class, transformer_family
from davae.backbones.lora import widen_lora
from davae.convert.checkpoints import load_state
from davae.convert.davae import official_davae
from davae.convert.lightningdit import dit, lightningdit, sit
from davae.convert.tiny import tiny_autoencoder
from davae.convert.vavae import vavae
from davae.data.latent_cache.import_shards import read_statistics
from davae.errors import ModelError, RecipeError
from davae.files.atomic import model_folder, save_tensors
from davae.files.outputs import check_tensors
from davae.files.ownership import check_out
from davae.pretrained.autoencoders import load_autoencoder
from davae.pretrained.lora_files import read_lora
from davae.pretrained.open import class_name, read_config
from davae.pretrained.stored import check_config, loading, planned
from davae.recipes.values import read_yaml_file
from davae.sample.class_conditional import ClassConditionalPipeline

# the architecture of the released VA-VAE (f16, 32 channels)
VAVAE_F16D32: dict[str, Any] = {
    "double_z": True,
    "z_channels": 32,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
# how the official samplers treat each model
LIGHTNING_SAMPLING = {"timestep_shift": 0.3, "cfg_interval_start": 0.2, "cfg_channels": 3}
DIT_SAMPLING = {"cfg_channels": 3}


def read_section(path: Path, key: str) -> dict[str, Any]:
    """The first mapping in a YAML file, however deep, that holds `key`; ModelError when there is none."""
    try:
        pending: list[Any] = [read_yaml_file(path, f"config {path}")]
    except RecipeError as error:
        raise ModelError(str(error)) from error
    while pending:
        node = pending.pop(0)
        if isinstance(node, dict):
            if key in node:
                return node
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    raise ModelError(f"config {path} has no section with {key}")


def convert_transformer(kind: str, checkpoint: Path, out: Path, vae: str | None, config: dict[str, Any]) -> Path:
    """`lightningdit`, `sit`, `repa` or `dit` weights -> a transformer's folder, or a whole pipeline where `vae` is given."""
    check_out(out, (checkpoint, vae) if vae else (checkpoint,))
    state = load_state(checkpoint)
    readers: dict[str, Any] = {"lightningdit": lightningdit, "sit": sit, "repa": sit, "dit": dit}
    if kind == "repa":
        config = {**config, "reversed_time": True}
    model = readers[kind](state, **config)
    if vae is None:
        with model_folder(out) as partial:
            model.save_pretrained(partial)
        return out
    autoencoder = load_autoencoder(vae)
    channels = int(autoencoder.config["latent_channels"])
    if channels != model.config["in_channels"]:
        raise ModelError(
            f"the transformer takes {model.config['in_channels']} channels, the autoencoder {vae} gives {channels}"
        )
    sampling: dict[str, Any] = {"lightningdit": LIGHTNING_SAMPLING, "dit": DIT_SAMPLING}.get(kind, {})
    scheduler = None
    if kind == "dit":
        scheduler = DDPMScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="learned_range", clip_sample=False
        )
    pipeline = ClassConditionalPipeline(autoencoder, model, scheduler, **sampling)
    with model_folder(out) as partial:
        pipeline.save_pretrained(partial)
    return out


def convert_vavae(checkpoint: Path, out: Path, config: Path | None, statistics: Path | None) -> Path:
    """VA-VAE weights -> an AutoencoderKL's folder."""
    check_out(out, [place for place in (checkpoint, config, statistics) if place])
    ddconfig = VAVAE_F16D32 if config is None else read_section(config, "ddconfig")["ddconfig"]
    measured = None if statistics is None else read_statistics(statistics, int(ddconfig["z_channels"]))
    model = vavae(load_state(checkpoint), ddconfig, measured)
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out


def convert_davae(checkpoint: Path, out: Path, config: Path, statistics: Path | None) -> Path:
    """The authors' DA-VAE weights -> a DetailVAE's folder; `statistics` are those of all C+D channels."""
    check_out(out, [place for place in (checkpoint, config, statistics) if place])
    model = official_davae(load_state(checkpoint), read_section(config, "ddconfig_base"))
    if statistics is not None:
        mean, std = (v.view(1, -1, 1, 1) for v in read_statistics(statistics, model.layout.channels))
        (base_mean, detail_mean), (base_std, detail_std) = model.layout.split(mean), model.layout.split(std)
        model.register_to_config(base_mean=base_mean.flatten().tolist(), base_std=base_std.flatten().tolist())
        model.set_detail_statistics(detail_mean.flatten(), detail_std.flatten())
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out


def convert_tiny(encoder: Path, decoder: Path, out: Path) -> Path:
    """`davae convert tiny`: TAESD's, TAEF1's or TAEF2's two files as one diffusers autoencoder."""
    check_out(out, (encoder, decoder))
    model = tiny_autoencoder(load_state(encoder), load_state(decoder))
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out


def convert_lora(file: Path, upgraded: str, out: Path) -> Path:
    """`davae convert lora`: a LoRA of the base, in any layout that its pipeline reads, as one for the upgraded model.

    Raises:
        ModelError: no readable LoRA, or one of another model.
        RunError: `out` is a file that davae did not write.
    """
    check_tensors(out, (file,))
    index = read_config(upgraded, "", "model_index.json")
    kind = class_name(index.get("_class_name", "DiffusionPipeline"))
    part = next((part for part in ("transformer", "unet") if part in index), None)
    if part is None:
        raise ModelError(f"model {upgraded} ({kind}) has no transformer or unet")
    with loading(f"model {upgraded}"):
        model = model_class(index[part][1])
        transformer_family(index[part][1])
    config = read_config(upgraded, part)
    check_config(config, f"{part} of model {upgraded}")
    with planned(f"{part} of model {upgraded}"):  # shapes alone
        transformer = model.from_config(config)
    state, settings = read_lora(file, model_class(kind), part, transformer.config)
    metadata = {"format": "pt", "davae": davae.__version__}
    if settings:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings)
    try:
        widened = widen_lora(state, transformer)
    except ModelError as error:
        raise ModelError(f"{file} does not fit {upgraded}: {error}") from error
    save_tensors(out, widened, metadata)
    return out
