"""How each text-to-image transformer is called in a training step: its packing, timesteps, prompt embeddings.

A family that has no call here can be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from davae.models.calls.base import TextCall
from davae.models.calls.flux import FluxCall
from davae.models.calls.sd3 import StableDiffusion3Call

CALLS: dict[str, TextCall] = {
    "SD3Transformer2DModel": StableDiffusion3Call(),
    "FluxTransformer2DModel": FluxCall(),
}
