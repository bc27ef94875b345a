"""Ways to enlarge a base model's images: filters, a network, any command, an upgrade."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError

from davae.data.decoding import read_image
from davae.data.images import to_images, to_tensor
from davae.errors import ModelError
from davae.pretrained.placement import own_device
from davae.sample.open import open_model
from davae.sample.upscale import check_enlarging, upscale
from davae.zoo import SHIPPED

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
STEPS, BATCH = 20, 8  # of an upgraded pipeline that enlarges


class Upscaler(Protocol):
    """A function that enlarges images. Prompts matter to an upgrade alone."""

    def __call__(self, images: list[Image.Image], prompts: Sequence[str] | None = None) -> list[Image.Image]: ...


def make_upscaler(method: str, size: int) -> Upscaler:
    """Return a function that enlarges images to `size` pixels.

    Args:
        method: `bilinear`, `bicubic` or `lanczos`; a weights file of a super-resolution network that spandrel knows; an
            upgraded model (a run, a pipeline's folder or `micro-upgraded`), which takes the images' prompts; or a command
            with `{input}` and `{output}`, two folders, that leaves each image in the second under its name.
        size: pixels; what a network or command gives in another size is brought to it by Lanczos.

    Raises:
        ModelError: none of these.
    """
    if method in FILTERS:
        return lambda images, prompts=None: [image.resize((size, size), FILTERS[method]) for image in images]
    if "{input}" in method and "{output}" in method:
        words = command_words(method)
        return lambda images, prompts=None: fitted(run_command(words, images), size)
    if os.path.isfile(method):
        network = load_network(Path(method))
        return lambda images, prompts=None: fitted(network_enlarged(network, images), size)
    if os.path.isdir(method) or method in SHIPPED:
        upgraded, _ = open_model(method)
        check_enlarging(upgraded, strength=0.0, steps=STEPS, times=1, batch_size=BATCH)
        return lambda images, prompts=None: fitted(
            upscale(upgraded, images, prompts, steps=STEPS, guidance_scale=1.0, batch_size=BATCH), size
        )
    raise ModelError(
        f"enlarger {method}: neither {', '.join(FILTERS)}, nor a weights file, an upgraded model's "
        "folder or a command with {input} and {output}"
    )


def fitted(images: list[Image.Image], size: int) -> list[Image.Image]:
    """Return images at `size`, unchanged where they have it.

    Args:
        images: of any size.
        size: side of a square in pixels.
    """
    square = (size, size)
    return [p if p.size == square else p.resize(square, Image.Resampling.LANCZOS) for p in images]


def load_network(path: Path) -> Any:
    """Return a super-resolution network (ESRGAN, SwinIR, HAT, ...) that spandrel reads.

    Raises:
        ModelError: spandrel is not installed, or does not know the file.
    """
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError, canonicalize_state_dict
    except ImportError as error:
        raise ModelError("super-resolution networks need `pip install 'davae[sr]'`") from error
    try:
        if path.suffix.lower() == ".pt":  # spandrel would run TorchScript, which can write files
            state = canonicalize_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            state = ModelLoader().load_state_dict_from_file(path)
        model = ModelLoader().load_from_state_dict(state)
    except (UnsupportedModelError, SafetensorError, UnpicklingError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"enlarger {path}: {' '.join(str(error).split())[:160] or type(error).__name__}") from error
    if not isinstance(model, ImageModelDescriptor) or model.input_channels != 3:
        raise ModelError(f"enlarger {path}: not a network from colour images to colour images")
    return model.to(own_device()).eval()


@torch.no_grad()
def network_enlarged(network: Any, images: list[Image.Image]) -> list[Image.Image]:
    """Enlarge images through a network on [0,1].

    Args:
        network: takes and gives (B,3,H,W) in [0,1].
        images: of one size.
    """
    pixels = torch.stack([to_tensor(image) for image in images]).to(own_device())  # (B,3,H,W) in [-1,1]
    return to_images(network(pixels / 2 + 0.5).clamp(0, 1) * 2 - 1)


def command_words(command: str) -> list[str]:
    """Split a command, which runs without a shell, into its words as a shell would.

    Raises:
        ModelError: an open quote, or a program that is not installed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ModelError(f"enlarger {command}: {str(error).lower()}; check the quotes") from error
    if shutil.which(words[0]) is None:
        raise ModelError(f"enlarging command failed: No such file or program {words[0]}; give its full path")
    return words


def run_command(command: list[str], images: list[Image.Image]) -> list[Image.Image]:
    """Enlarge images with a program that reads one folder and writes another.

    Args:
        command: its words; `{input}` and `{output}` in them become the folders, other braces stay.

    Raises:
        ModelError: the command fails, or leaves an image out.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input", Path(folder) / "output"
        source.mkdir()
        target.mkdir()
        names = [f"{number:05d}.png" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(source / name)
        folders = {"{input}": str(source), "{output}": str(target)}
        words = [re.sub("{input}|{output}", lambda found: folders[found[0]], word) for word in command]
        try:
            subprocess.run(words, check=True, capture_output=True, text=True, errors="replace")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            raise ModelError(f"enlarging command failed: {' '.join(reason.split())[-200:]}") from error
        missing = [name for name in names if not (target / name).is_file()]
        if missing:
            raise ModelError(f"enlarging command left no {missing[0]} in its output folder ({len(missing)} missing)")
        return [read_image(target / name) for name in names]
