"""LightningDiT for another autoencoder's latents.

The body is pretrained, while the patch embedder and the head are new.
"""

from __future__ import annotations

from typing import Any

from davae.backbones.lightning_dit import LightningDiT

EMBEDDER, HEAD = "x_embedder", "final_layer"
NEW_WEIGHTS = (f"{EMBEDDER}.", f"{HEAD}.linear.")  # their shapes depend on the latents
POSITIONS = ("pos_embed", "feat_rope.")  # tables of the new grid


def change_latents(transformer: LightningDiT, channels: int, patch_size: int, input_size: int) -> LightningDiT:
    """Return the pretrained body for latents (B,channels,input_size,input_size).

    Blocks, time and class embeddings and the head's modulation are the pretrained ones. The patch embedder and the
    head's matrix start as in a model from scratch: random, and zero. Positions are those of the new grid.

    Args:
        transformer: the pretrained model.
        channels: C of the new latents.
        patch_size: p, latent positions per token, each way.
        input_size: side of the latent grid.

    Raises:
        ValueError: a grid that does not divide into patches.
    """
    config: Any = transformer.config
    sizes = {name: value for name, value in config.items() if not name.startswith("_")}
    own: dict[str, Any] = {"in_channels": channels, "patch_size": patch_size, "input_size": input_size}
    own |= {"out_channels": None, "sample_size": None, "detail_channels": 0, "head_options": None}
    changed = LightningDiT(**{**sizes, **own})
    changed = changed.to(transformer.device, transformer.dtype)  # type: ignore[arg-type]
    new = (*NEW_WEIGHTS, *POSITIONS, "detail_time.", "detail_head.")
    kept = {k: v for k, v in transformer.state_dict().items() if not k.startswith(new)}
    result = changed.load_state_dict(kept, strict=False)
    unexpected = [name for name in result.missing_keys if not name.startswith((*NEW_WEIGHTS, *POSITIONS))]
    assert not unexpected + result.unexpected_keys, f"weights do not fit: {unexpected + result.unexpected_keys}"
    return changed
