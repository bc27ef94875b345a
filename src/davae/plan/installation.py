"""State of an installation: versions, device, memory, attention kernels, optional parts."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

import davae
from davae.recipes.hardware import GIB

# (verb or setting, module, how to install it)
OPTIONAL = (
    ("davae app", "gradio", 'pip install "davae[app]"'),
    ("hub datasets and parquet files", "datasets", 'pip install "davae[hub]"'),
    ("--upscale with a network", "spandrel", 'pip install "davae[sr]"'),
    ("bench sample --helper int8", "torchao", 'pip install "davae[int8]"'),
    ("run.trackers=[tensorboard]", "tensorboard", "pip install tensorboard"),
    ("run.trackers=[wandb]", "wandb", "pip install wandb"),
)
SMALL_DISK = 10 * GIB


def examine() -> dict[str, Any]:
    """Return the state of the installation as plain values."""
    versions, problems = _versions()
    machine = _machine()
    optional = [
        {"for": what, "package": module, "installed": importlib.util.find_spec(module) is not None, "install": how}
        for what, module, how in OPTIONAL
    ]
    if machine["disk_free_gib"] * GIB < SMALL_DISK:
        problems.append(
            f"the disk of {Path.cwd()} has {machine['disk_free_gib']:.1f} GiB free; large models take more"
        )
    return {"versions": versions, "machine": machine, "optional": optional, "problems": problems}


def _versions() -> tuple[dict[str, str | None], list[str]]:
    """Return installed versions by package, and what does not meet davae's requirements."""
    found: dict[str, str | None] = {"davae": davae.__version__, "python": platform.python_version()}
    problems = []
    try:
        needed = [Requirement(text) for text in requires("davae") or []]
    except PackageNotFoundError:  # run from a source tree
        needed = [Requirement(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")]
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            found[requirement.name] = None
            problems.append(f'{requirement.name} is missing; pip install "{requirement}"')
            continue
        if not requirement.specifier.contains(found[requirement.name] or "", prereleases=True):
            problems.append(f'{requirement.name} is {found[requirement.name]}; pip install "{requirement}"')
    return found, problems


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": _memory() / GIB,
        "disk_free_gib": shutil.disk_usage(Path.cwd()).free / GIB,
        "devices": ["cpu"],
        "attention_kernels": ["math"],
    }
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        found["devices"] = [f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards]
        backends = torch.backends.cuda
        kernels = {
            "flash": backends.flash_sdp_enabled(),
            "memory-efficient": backends.mem_efficient_sdp_enabled(),
            "cudnn": backends.cudnn_sdp_enabled(),
            "math": backends.math_sdp_enabled(),
        }
        found["attention_kernels"] = [name for name, enabled in kernels.items() if enabled]
        found["bfloat16"] = torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available():
        found["devices"] = ["Apple GPU (mps)"]
    return found


def _memory() -> int:
    """Return the bytes of main memory that this machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        import psutil

        return psutil.virtual_memory().total
