"""LoRA files of a base model, widened for its upgraded one."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

import davae
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import component_in, family_by_class
from davae.backbones.lora import widen_lora
from davae.errors import ModelError
from davae.files.atomic import save_tensors
from davae.files.outputs import check_tensor_file
from davae.pretrained.lora_files import read_lora
from davae.pretrained.open import class_name, read_config
from davae.pretrained.stored import check_config, loading, planned


def convert_lora(file: Path, upgraded: str, out: Path) -> Path:
    """Widen a LoRA of the base, in any layout that its pipeline reads, for the upgraded model.

    Args:
        file: the LoRA.
        upgraded: folder or hub id of the upgraded pipeline.
        out: the LoRA file to write.

    Raises:
        ModelError: no readable LoRA, or one of another model.
        RunError: `out` is a file that davae did not write.
    """
    check_tensor_file(out, (file,))
    index = read_config(upgraded, "", "model_index.json")
    kind = class_name(index.get("_class_name", "DiffusionPipeline"))
    part = component_in(index)
    if part is None:
        raise ModelError(f"model {upgraded} ({kind}) has no transformer or unet")
    with loading(f"model {upgraded}"):
        model = model_class(index[part][1])
        family_by_class(index[part][1])
    config = read_config(upgraded, part)
    check_config(config, f"{part} of model {upgraded}")
    with planned(f"{part} of model {upgraded}"):  # shapes alone
        transformer = model.from_config(config)
    state, settings = read_lora(file, model_class(kind), part, transformer.config)
    metadata = {"format": "pt", "davae": davae.__version__}
    if settings:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings)
    try:
        widened = widen_lora(state, transformer)
    except ModelError as error:
        raise ModelError(f"{file} does not fit {upgraded}: {error}") from error
    save_tensors(out, widened, metadata)
    return out
