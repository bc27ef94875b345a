"""How each family's transformer is called in a training step: its packing, timesteps, prompt embeddings or classes.

A family that has no call here can be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from davae.models.calls.aura_flow import AuraFlowCall
from davae.models.calls.base import Call, SizedCall, TextCall
from davae.models.calls.chroma import ChromaCall
from davae.models.calls.class_conditional import DiTCall, LightningDiTCall
from davae.models.calls.cogview3 import CogView3PlusCall
from davae.models.calls.cogview4 import CogView4Call
from davae.models.calls.ernie_image import ErnieImageCall
from davae.models.calls.flux import FluxCall
from davae.models.calls.flux2 import Flux2Call
from davae.models.calls.flux_like import BriaCall, LongCatImageCall, OvisImageCall
from davae.models.calls.hidream import HiDreamCall
from davae.models.calls.hunyuan_dit import HunyuanDiTCall
from davae.models.calls.krea2 import Krea2Call
from davae.models.calls.lumina import Lumina2Call, LuminaNextCall
from davae.models.calls.nucleus import NucleusImageCall
from davae.models.calls.pixart import PixArtCall
from davae.models.calls.prx import PRXCall
from davae.models.calls.qwen_image import QwenImage21Call, QwenImageCall
from davae.models.calls.sana import SanaCall
from davae.models.calls.sd3 import StableDiffusion3Call
from davae.models.calls.unet import UNetCall
from davae.models.calls.z_image import ZImageCall

TEXT_CALLS: dict[str, TextCall] = {
    "SD3Transformer2DModel": StableDiffusion3Call(),
    "FluxTransformer2DModel": FluxCall(),
    "Flux2Transformer2DModel": Flux2Call(),
    "ChromaTransformer2DModel": ChromaCall(),
    "QwenImageTransformer2DModel": QwenImageCall(),
    "QwenImage21Transformer2DModel": QwenImage21Call(),
    "ZImageTransformer2DModel": ZImageCall(),
    "OvisImageTransformer2DModel": OvisImageCall(),
    "LongCatImageTransformer2DModel": LongCatImageCall(),
    "BriaTransformer2DModel": BriaCall(),
    "ErnieImageTransformer2DModel": ErnieImageCall(),
    "Krea2Transformer2DModel": Krea2Call(),
    "NucleusMoEImageTransformer2DModel": NucleusImageCall(),
    "SanaTransformer2DModel": SanaCall(),
    "AuraFlowTransformer2DModel": AuraFlowCall(),
    "Lumina2Transformer2DModel": Lumina2Call(),
    "LuminaNextDiT2DModel": LuminaNextCall(),
    "CogView4Transformer2DModel": CogView4Call(),
    "HiDreamImageTransformer2DModel": HiDreamCall(),
    "PRXTransformer2DModel": PRXCall(),
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


def bound(call: TextCall, pixel_factor: int, scheduler: Any) -> TextCall:
    """A call that knows the pipeline it is made for, where its model is told of it.

    Args:
        pixel_factor: pixels per latent position, each way.
        scheduler: the pipeline's.
    """
    if isinstance(call, SizedCall):
        call = replace(call, pixel_factor=pixel_factor)
    if isinstance(call, CogView4Call):
        call = replace(call, schedule=scheduler.config)
    return call
