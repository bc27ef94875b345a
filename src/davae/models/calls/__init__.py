"""How each family's transformer is called in a training step: its packing, timesteps, prompt embeddings or classes.

A family that has no call here can be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from davae.models.calls.base import Call, TextCall
from davae.models.calls.class_conditional import DiTCall, LightningDiTCall
from davae.models.calls.cogview3 import CogView3PlusCall
from davae.models.calls.flux import FluxCall
from davae.models.calls.hunyuan_dit import HunyuanDiTCall
from davae.models.calls.pixart import PixArtCall
from davae.models.calls.sd3 import StableDiffusion3Call
from davae.models.calls.unet import UNetCall

TEXT_CALLS: dict[str, TextCall] = {
    "SD3Transformer2DModel": StableDiffusion3Call(),
    "FluxTransformer2DModel": FluxCall(),
    "PixArtTransformer2DModel": PixArtCall(),
    "HunyuanDiT2DModel": HunyuanDiTCall(),
    "CogView3PlusTransformer2DModel": CogView3PlusCall(),
    "UNet2DConditionModel": UNetCall(),
}
CLASS_CALLS: dict[str, Call] = {
    "DiTTransformer2DModel": DiTCall(),
    "LightningDiT": LightningDiTCall(),
}
CALLS: dict[str, Call] = {**TEXT_CALLS, **CLASS_CALLS}
