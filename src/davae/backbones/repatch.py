"""A larger patch size for a pretrained LightningDiT.

This is the usual way to fewer tokens and the baseline of the paper.
"""

from __future__ import annotations

from typing import Any

from davae.backbones.lightning_dit import LightningDiT


def change_patch(transformer: LightningDiT, patch_size: int, input_size: int) -> LightningDiT:
    """Return the pretrained blocks with an embedder and a head for a larger patch size.

    A token starts as the mean of what its positions would have been as tokens of the pretrained patch size, and the
    head gives all of them the same output. Where nothing changes, the input is returned.

    Args:
        transformer: the pretrained model.
        patch_size: p, a multiple of the pretrained one.
        input_size: side of the latent grid. Tokens get the positions that a model of that grid has: 0, 1, 2, ..., so a grid
            of as many tokens keeps the pretrained ones.

    Raises:
        ValueError: a patch size that is not a multiple.
    """
    config: Any = transformer.config
    if patch_size % config.patch_size:
        raise ValueError(f"patch_size {patch_size} is not a multiple of the pretrained {config.patch_size}")
    if (patch_size, input_size) == (config.patch_size, config.input_size):
        return transformer
    sizes = {k: v for k, v in config.items() if not k.startswith("_")}
    changed = LightningDiT(**{**sizes, "patch_size": patch_size, "input_size": input_size, "sample_size": None})
    changed = changed.to(transformer.device, transformer.dtype)  # type: ignore[arg-type]
    ratio = patch_size // config.patch_size
    state = transformer.state_dict()
    # (width,C,p,p): each old patch carries its share of the mean
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].repeat(1, 1, ratio, ratio) / ratio**2
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        old = config.patch_size
        rows = state[name].unflatten(0, (old, old, -1))  # (p,p,c,...)
        state[name] = rows.repeat(ratio, ratio, *[1] * (rows.ndim - 2)).flatten(0, 2)
    own = changed.state_dict()
    for name in own:
        if name == "pos_embed" or name.startswith("feat_rope."):
            state[name] = own[name]
    changed.load_state_dict(state)
    return changed
