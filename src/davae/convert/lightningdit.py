"""Official LightningDiT, DiT and SiT weights as `davae.LightningDiT`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from davae.backbones.lightning_dit import LightningDiT
from davae.convert.checkpoints import State, load_state, load_strictly, strip_prefixes
from davae.errors import ModelError
from davae.files.atomic import model_folder
from davae.files.ownership import check_out
from davae.pretrained.autoencoders import load_autoencoder
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.vae.codec import latent_shape

PLAIN = {"use_qknorm": False, "use_swiglu": False, "use_rope": False, "use_rmsnorm": False, "learn_sigma": True}


def lightningdit(state_dict: State, **config: Any) -> LightningDiT:
    """Convert official LightningDiT weights into a diffusers model.

    Sizes are read from the weights; what they cannot say (`num_heads`, without QK-norm and rotary embedding) comes from
    `config`, under the official names. A config that contradicts the weights is refused.

    Args:
        state_dict: official key names; `module.` and `_orig_mod.` prefixes are taken off.
        config: `num_heads`, and any of `input_size`, `patch_size`, `in_channels`, `hidden_size`, `depth`, `num_classes`,
            `use_qknorm`, `use_swiglu`, `use_rope`, `use_rmsnorm`, `wo_shift`, `learn_sigma`, `mlp_ratio`, and of
            LightningDiT's own options.

    Raises:
        ModelError: weights that are not a LightningDiT's, or that contradict `config`, naming keys.
    """
    state = strip_prefixes(state_dict)
    found = read_sizes(state, config)
    given = {name: value for name, value in config.items() if name not in ("class_dropout_prob", "use_checkpoint")}
    for name, value in given.items():
        if name in found and found[name] != value:
            raise ModelError(f"{name} is {value} in the config, the weights have {found[name]}")
    try:
        model = LightningDiT(**{**found, **given})
    except (TypeError, ValueError) as error:
        raise ModelError(f"this configuration is not a LightningDiT's: {error}") from error
    load_strictly(model, state, "a LightningDiT of this configuration")
    return model.eval()


def read_sizes(state: State, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that the shapes of a LightningDiT's weights show.

    Args:
        state: the weights.
        config: given values; `num_heads` is needed where the weights do not show it.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
              "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing:
        raise ModelError(f"these are no LightningDiT, DiT or SiT weights: missing {', '.join(missing)}")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens = state["pos_embed"].shape[1]
    groups = state["final_layer.linear.weight"].shape[0] // (patch * patch * channels)
    swiglu = "blocks.0.mlp.w12.weight" in state
    qk_norm = state.get("blocks.0.attn.q_norm.weight")
    sizes = {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": groups == 2,
        "use_qknorm": qk_norm is not None,
        "use_swiglu": swiglu,
        "use_rope": "feat_rope.freqs_cos" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 4 * width,
    }
    if qk_norm is not None:
        sizes["num_heads"] = width // len(qk_norm)
    elif "feat_rope.freqs_cos" in state:
        sizes["num_heads"] = width // state["feat_rope.freqs_cos"].shape[1]
    elif "num_heads" not in config:
        raise ModelError("num_heads cannot be read from these weights; give it, e.g. 16 for the XL models")
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    if not swiglu:
        sizes["mlp_ratio"] = hidden / width
    return sizes


def sit(state_dict: State, *, reversed_time: bool = False, **config: Any) -> LightningDiT:
    """Convert official SiT or REPA weights into a velocity model.

    Args:
        state_dict: official key names. REPA's projection heads (`projectors.*`) belong to its training and are left out.
        reversed_time: REPA's convention, t = 1 being noise.
        config: as for `lightningdit`.
    """
    kept = {n: v for n, v in strip_prefixes(state_dict).items() if not n.startswith(("projectors.", "projector."))}
    return lightningdit(kept, **{**PLAIN, **config, "reversed_time": reversed_time, "prediction_type": "velocity"})


def dit(state_dict: State, **config: Any) -> LightningDiT:
    """Convert official DiT weights into an epsilon model with learned variance.

    diffusers' own DiTTransformer2DModel is not used: it spaces the timestep's frequencies by i/127 where DiT has i/128, so
    that it does not give the official outputs.
    """
    return lightningdit(state_dict, **{**PLAIN, **config, "prediction_type": "epsilon"})


# how the official samplers treat each model
LIGHTNING_SAMPLING = {"timestep_shift": 0.3, "cfg_interval_start": 0.2, "cfg_channels": 3}


DIT_SAMPLING = {"cfg_channels": 3}


def convert_transformer(kind: str, checkpoint: Path, out: Path, vae: str | None, config: dict[str, Any]) -> Path:
    """Write the folder of a transformer of official weights, or of a whole pipeline.

    Args:
        kind: `lightningdit`, `sit`, `repa` or `dit`.
        checkpoint: official weights.
        out: folder to write.
        vae: autoencoder of the pipeline; None writes the transformer alone.
        config: sizes that the weights do not show.
    """
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
    _, channels = latent_shape(autoencoder.config, type(autoencoder).__name__)
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
