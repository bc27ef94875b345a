"""How each text-to-image transformer is called in a training step: its packing, timesteps, prompt embeddings.

A family that has no call here can be expanded (`families.py`) but not trained.
"""

from __future__ import annotations

from davae.models.calls.base import TextCall
from davae.models.calls.chroma import ChromaCall
from davae.models.calls.ernie_image import ErnieImageCall
from davae.models.calls.flux import FluxCall
from davae.models.calls.flux2 import Flux2Call
from davae.models.calls.flux_like import BriaCall, LongCatImageCall, OvisImageCall
from davae.models.calls.krea2 import Krea2Call
from davae.models.calls.nucleus import NucleusImageCall
from davae.models.calls.qwen_image import QwenImage21Call, QwenImageCall
from davae.models.calls.sd3 import StableDiffusion3Call
from davae.models.calls.z_image import ZImageCall

CALLS: dict[str, TextCall] = {
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
}
