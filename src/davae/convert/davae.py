"""The authors' ImageNet DA-VAE weights as a DetailVAE with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from davae.convert.checkpoints import State, load_state, load_strictly, read_section
from davae.convert.vavae import kl_config, rename, under
from davae.data.latent_cache.import_shards import read_statistics
from davae.errors import ModelError
from davae.files.atomic import model_folder
from davae.files.ownership import check_out
from davae.vae.detail_vae import DetailVAE


def official_davae(state_dict: State, config: dict[str, Any]) -> DetailVAE:
    """Convert the authors' DA-VAE (ImageNet half) into a DetailVAE.

    Its base image is a bicubic x0.5 without antialiasing. Unused weights of the released files (the last convolution
    of the detail encoder, the first of the decoder) are left out. Without measured statistics latents are normalised by
    the identity; `davae cache-latents` or `set_detail_statistics` measures them.

    Args:
        state_dict: `base_encoder.*`, `base_quant_conv.*`, `da.encoder.*`, `da.da_down.*`, `da.da_up.*`, `da.decoder.*`.
        config: `ddconfig_base`, `ddconfig_da`, `base_embed_dim`, `align_method`, `da_mode` of the official YAML.

    Raises:
        ModelError: another alignment or mode, halves that do not belong together, or weights that do not fit, by name.
    """
    for name, only in (("align_method", "mean"), ("da_mode", "detail")):
        if config.get(name, only) != only:
            raise ModelError(f"{name} is {config[name]}: a DetailVAE is only what the authors call '{only}'")
    base_config, da_config = config["ddconfig_base"], config["ddconfig_da"]
    scale = int(da_config["resolution"]) // int(base_config["resolution"])
    same = ("ch", "ch_mult", "num_res_blocks")
    differing = [key for key in same if base_config[key] != da_config[key]]
    if differing:
        raise ModelError(f"ddconfig_base and ddconfig_da differ in {differing[0]}: not the authors' warm start")
    if [side // scale for side in da_config["attn_resolutions"]] != list(base_config["attn_resolutions"]):
        raise ModelError("ddconfig_base and ddconfig_da attend at different levels: not the authors' warm start")
    channels = int(config.get("base_embed_dim", base_config["z_channels"]))
    if "da.da_up.conv.weight" not in state_dict:
        raise ModelError("the weights do not fit a DA-VAE: missing da.da_up.conv.weight")
    detail_channels = int(state_dict["da.da_up.conv.weight"].shape[1]) - channels
    quant = "base_quant_conv.weight" in state_dict
    vae_config = kl_config(base_config, channels, quant)
    model = DetailVAE(
        base_class="AutoencoderKL",
        base_config=vae_config,
        detail_channels=detail_channels,
        scale=scale,
        downsample="bicubic",
    )
    levels = len(vae_config["block_out_channels"])
    detail = {n: v for n, v in under(state_dict, "da.encoder.").items() if not n.startswith("conv_out.")}
    decoder = {n: v for n, v in under(state_dict, "da.decoder.").items() if not n.startswith("conv_in.")}
    parts = {
        "base_encoder.": rename(under(state_dict, "base_encoder."), levels),
        "base_quant_conv.": under(state_dict, "base_quant_conv."),
        "detail_encoder.": rename(detail, levels),
        "detail_encoder.conv_out.": shortcut(under(state_dict, "da.da_down.")),
        "decoder.": rename(decoder, levels),
        "decoder.conv_in.": shortcut(under(state_dict, "da.da_up.")),
    }
    weights = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in part.items()}
    # pieces of the official training module that a DetailVAE has no place for: its loss and the base's own decoder
    known = ("base_", "da.", "loss.", "model_ema.")
    weights |= {name: value for name, value in state_dict.items() if not name.startswith(known)}
    load_strictly(model, weights, "a DetailVAE of this configuration")
    return model.eval()


def shortcut(state: State) -> State:
    return {name.replace("shortcut_proj.", "shortcut."): value for name, value in state.items()}


def convert_davae(checkpoint: Path, out: Path, config: Path, statistics: Path | None) -> Path:
    """Write a DetailVAE's folder of the authors' DA-VAE weights.

    Args:
        checkpoint: official weights.
        out: folder to write.
        config: the official YAML.
        statistics: `latents_stats.pt` of all C+D channels; None leaves the identity.
    """
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
