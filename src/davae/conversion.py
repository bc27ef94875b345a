"""What `davae convert` does: official files in, diffusers folders out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from diffusers import DDPMScheduler

from davae.convert import dit, lightningdit, official_davae, sit, tiny_autoencoder, vavae
from davae.convert.checkpoints import load_state
from davae.data.latent_shards import read_statistics
from davae.models.autoencoders import load_autoencoder
from davae.models.pipeline import ModelError
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.train.state import new_folder

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
    if not path.is_file():
        raise ModelError(f"config {path} does not exist")
    try:
        pending: list[Any] = [yaml.safe_load(path.read_text(encoding="utf-8"))]
    except yaml.YAMLError as error:
        raise ModelError(f"config {path} is not valid YAML: {' '.join(str(error).split())[:160]}") from error
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
    state = load_state(checkpoint)
    readers: dict[str, Any] = {"lightningdit": lightningdit, "sit": sit, "repa": sit, "dit": dit}
    if kind == "repa":
        config = {**config, "reversed_time": True}
    model = readers[kind](state, **config)
    if vae is None:
        with new_folder(out) as partial:
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
    with new_folder(out) as partial:
        pipeline.save_pretrained(partial)
    return out


def convert_vavae(checkpoint: Path, out: Path, config: Path | None, statistics: Path | None) -> Path:
    """VA-VAE weights -> an AutoencoderKL's folder."""
    ddconfig = VAVAE_F16D32 if config is None else read_section(config, "ddconfig")["ddconfig"]
    measured = None if statistics is None else read_statistics(statistics, int(ddconfig["z_channels"]))
    model = vavae(load_state(checkpoint), ddconfig, measured)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
    return out


def convert_davae(checkpoint: Path, out: Path, config: Path, statistics: Path | None) -> Path:
    """The authors' DA-VAE weights -> a DetailVAE's folder; `statistics` are those of all C+D channels."""
    model = official_davae(load_state(checkpoint), read_section(config, "ddconfig_base"))
    if statistics is not None:
        mean, std = (v.view(1, -1, 1, 1) for v in read_statistics(statistics, model.layout.channels))
        (base_mean, detail_mean), (base_std, detail_std) = model.layout.split(mean), model.layout.split(std)
        model.register_to_config(base_mean=base_mean.flatten().tolist(), base_std=base_std.flatten().tolist())
        model.set_detail_statistics(detail_mean.flatten(), detail_std.flatten())
    with new_folder(out) as partial:
        model.save_pretrained(partial)
    return out


def convert_tiny(encoder: Path, decoder: Path, out: Path) -> Path:
    """`davae convert tiny`: TAESD's, TAEF1's or TAEF2's two files as one diffusers autoencoder."""
    model = tiny_autoencoder(load_state(encoder), load_state(decoder))
    with new_folder(out) as partial:
        model.save_pretrained(partial)
    return out
