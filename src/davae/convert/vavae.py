"""Autoencoders of the latent-diffusion code under diffusers' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from davae.convert.checkpoints import State, load_state, load_strictly, read_section
from davae.data.latent_cache.import_shards import read_statistics
from davae.errors import ModelError
from davae.files.atomic import model_folder
from davae.files.ownership import check_out

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
HALF = ("encoder", "decoder")


def kl_config(ddconfig: dict[str, Any], embed_dim: int, quant_convs: bool) -> dict[str, Any]:
    """Return the config of the AutoencoderKL that a latent-diffusion `ddconfig` describes.

    Its latents are normalised by the identity.

    Args:
        ddconfig: the official section.
        embed_dim: channels of the latents.
        quant_convs: whether the weights have `quant_conv` and `post_quant_conv`.

    Raises:
        ModelError: a ddconfig that diffusers' class cannot express.
    """
    expressible = {
        "double_z": ddconfig.get("double_z", True) is True,
        "dropout": not ddconfig.get("dropout"),
        "attn_type": ddconfig.get("attn_type", "vanilla") == "vanilla",
        "z_channels": int(ddconfig["z_channels"]) == embed_dim or quant_convs,
    }
    for name, fits in expressible.items():
        if not fits:
            raise ModelError(f"ddconfig.{name} is {ddconfig.get(name)}: AutoencoderKL has no such architecture")
    if int(ddconfig["z_channels"]) != embed_dim:
        raise ModelError(f"z_channels {ddconfig['z_channels']} and embed_dim {embed_dim} differ: not supported")
    multipliers = list(ddconfig["ch_mult"])
    sides = [int(ddconfig["resolution"]) // 2**level for level in range(len(multipliers))]
    attended = [side in ddconfig.get("attn_resolutions", ()) for side in sides]
    return {
        "in_channels": int(ddconfig.get("in_channels", 3)),
        "out_channels": int(ddconfig.get("out_ch", 3)),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attended[::-1]),
        "block_out_channels": tuple(int(ddconfig["ch"]) * m for m in multipliers),
        "layers_per_block": int(ddconfig["num_res_blocks"]),
        "latent_channels": embed_dim,
        "norm_num_groups": 32,
        "sample_size": int(ddconfig["resolution"]),
        "scaling_factor": 1.0,
        "force_upcast": False,
        "use_quant_conv": quant_convs,
        "use_post_quant_conv": quant_convs,
    }


def diffusers_name(name: str, levels: int) -> str:
    """Return the name in diffusers' Encoder or Decoder of a latent-diffusion parameter.

    The decoder's `up.i` count from the finest level, diffusers' from the coarsest.

    Args:
        name: its name without `encoder.` or `decoder.`.
        levels: number of resolutions.
    """
    name = re.sub(r"^up\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"^down\.(\d+)\.", r"down_blocks.\1.", name)
    name = re.sub(r"^mid\.block_(\d)\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"^mid\.attn_1\.", "mid_block.attentions.0.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name)
    name = re.sub(r"\.downsample\.conv\.", ".downsamplers.0.conv.", name)
    name = re.sub(r"\.upsample\.conv\.", ".upsamplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace("norm_out.", "conv_norm_out.")
    if found := re.search(r"(\.attentions\.\d+\.)(q|k|v|proj_out|norm)\.", name):
        name = name.replace(found[0], f"{found[1]}{ATTENTION[found[2]]}.")
    return name


def rename(state: State, levels: int) -> State:
    """Return weights under diffusers' names, with 1x1 attention kernels as matrices.

    Args:
        state: weights of one latent-diffusion encoder or decoder.
        levels: its number of resolutions.
    """

    def shaped(name: str, value: Tensor) -> Tensor:
        return value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value

    renamed = {diffusers_name(name, levels): value for name, value in state.items()}
    return {name: shaped(name, value) for name, value in renamed.items()}


def under(state: State, prefix: str) -> State:
    """Return the part of a state dict below a prefix, without the prefix.

    Args:
        state: weights.
        prefix: what the names begin with.
    """
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def vavae(
    state_dict: State, ddconfig: dict[str, Any], statistics: tuple[Tensor, Tensor] | None = None
) -> AutoencoderKL:
    """Convert weights of VA-VAE, or of any latent-diffusion KL autoencoder.

    Args:
        state_dict: `encoder.*`, `decoder.*` and, where it has them, `quant_conv.*` and `post_quant_conv.*`. The parts of
            VA-VAE that only its training uses (`foundation_model`, `linear_proj`, `loss`) are left out.
        ddconfig: the architecture section of the official YAML.
        statistics: per-channel (mean, std) from `latents_stats.pt`; without them latents are normalised by the identity.

    Raises:
        ModelError: an architecture that AutoencoderKL lacks, or weights that do not fit, by name.
    """
    quant = "quant_conv.weight" in state_dict
    embed_dim = int(state_dict["post_quant_conv.weight"].shape[1]) if quant else int(ddconfig["z_channels"])
    config = kl_config(ddconfig, embed_dim, quant)
    levels = len(config["block_out_channels"])
    if statistics is not None:
        mean, std = statistics
        if len(mean) != embed_dim:
            raise ModelError(f"the statistics have {len(mean)} channels, the autoencoder {embed_dim}")
        config |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    weights: State = {}
    for half in HALF:
        weights |= {f"{half}.{n}": v for n, v in rename(under(state_dict, f"{half}."), levels).items()}
    for name in ("quant_conv", "post_quant_conv"):
        weights |= {f"{name}.{n}": v for n, v in under(state_dict, f"{name}.").items()}
    used_in_training = ("foundation_model.", "linear_proj.", "loss.", "model_ema.")
    weights |= {
        name: value
        for name, value in state_dict.items()
        if not name.startswith((*used_in_training, "encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }
    model = AutoencoderKL(**config)
    load_strictly(model, weights, "an AutoencoderKL of this ddconfig")
    return model.eval()


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


def convert_vavae(checkpoint: Path, out: Path, config: Path | None, statistics: Path | None) -> Path:
    """Write an AutoencoderKL's folder of VA-VAE weights.

    Args:
        checkpoint: official weights.
        out: folder to write.
        config: the official YAML; None is the released f16d32's.
        statistics: `latents_stats.pt`; None leaves the identity.
    """
    check_out(out, [place for place in (checkpoint, config, statistics) if place])
    ddconfig = VAVAE_F16D32 if config is None else read_section(config, "ddconfig")["ddconfig"]
    measured = None if statistics is None else read_statistics(statistics, int(ddconfig["z_channels"]))
    model = vavae(load_state(checkpoint), ddconfig, measured)
    with model_folder(out) as partial:
        model.save_pretrained(partial)
    return out
