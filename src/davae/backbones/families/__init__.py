"""How each family's transformer is called in a training step: its packing, timesteps, prompt embeddings or classes.

A family that has no call here can be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from davae.backbones.call import Call, SizedCall, TextCall
from davae.backbones.families.aura_flow import AuraFlowCall
from davae.backbones.families.chroma import ChromaCall
from davae.backbones.families.class_conditional import DiTCall, LightningDiTCall
from davae.backbones.families.cogview3 import CogView3PlusCall
from davae.backbones.families.cogview4 import CogView4Call
from davae.backbones.families.ernie_image import ErnieImageCall
from davae.backbones.families.flux import FluxCall
from davae.backbones.families.flux2 import Flux2Call
from davae.backbones.families.flux_like import BriaCall, LongCatImageCall, OvisImageCall
from davae.backbones.families.hidream import HiDreamCall
from davae.backbones.families.hunyuan_dit import HunyuanDiTCall
from davae.backbones.families.krea2 import Krea2Call
from davae.backbones.families.lumina import Lumina2Call, LuminaNextCall
from davae.backbones.families.nucleus import NucleusImageCall
from davae.backbones.families.pixart import PixArtCall
from davae.backbones.families.prx import PRXCall
from davae.backbones.families.qwen_image import QwenImage21Call, QwenImageCall
from davae.backbones.families.sana import SanaCall
from davae.backbones.families.sd3 import StableDiffusion3Call
from davae.backbones.families.unet import UNetCall
from davae.backbones.families.z_image import ZImageCall

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
