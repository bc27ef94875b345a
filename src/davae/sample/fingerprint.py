"""Fingerprint of a model's weights, which distinguishes images of older weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from davae.data.latent_cache.key import hash_values
from davae.data.shards.copies import cache_folder
from davae.errors import ModelError, RunError
from davae.files.atomic import atomic_text
from davae.files.reading import load_json
from davae.pretrained.open import HUB_ID, Configs, fetch_file

logger = logging.getLogger(__name__)

LOADED = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}  # what loading a pipeline reads
LARGE = 1 << 20  # bytes from which a file's hash is remembered
STOCHASTIC = (  # schedulers that draw the noise of their steps from the generator that they get
    "DDPM", "DDPMParallel", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "FlowMatchLCM", "SCM", "TCD",
    "SASolver", "UnCLIP",
)  # fmt: skip
STEP_NOISE = 3  # version of the rule that seeds this noise: 1 gave the starting noise, 2 none in SD3, FLUX, ...


def model_fingerprint(places: Sequence[str]) -> str:
    """Return a hash of the names and contents of the files that models are loaded from.

    Every byte counts, because a short training may change one tensor. Hashes of large files are remembered in davae's
    cache folder under their inode, size and times, so that a second look at 24 GB of unchanged weights takes
    milliseconds; the first reads them once, as loading them does. Files of the hub's cache are named by their hash, and a
    hub id counts by its commit. Where a scheduler adds noise, the rule of this noise counts too.

    Args:
        places: folders or hub ids, in the order in which they make up the model.

    Raises:
        ModelError: no such folder, and no hub id that the hub gives.
    """
    rule = [("step noise", STEP_NOISE)] if any(map(_adds_noise, places)) else []
    return hash_values([*(_place(place) for place in places), *rule])


def _adds_noise(place: str) -> bool:
    try:
        config = Configs(place).read("scheduler", "scheduler_config.json")
    except ModelError:  # none, or no model, which is refused where it is loaded
        return False
    known = str(config.get("_class_name")).removesuffix("Scheduler") in STOCHASTIC
    return known or bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type")).startswith("sde")


def _place(place: str) -> list[tuple[str, str]]:
    folder = Path(place)
    if not folder.is_dir() and not HUB_ID.fullmatch(place):
        return [(place, "")]  # whoever loads it gets the error
    if not folder.is_dir():
        index = fetch_file(place, "", "model_index.json")  # .../snapshots/COMMIT/model_index.json
        return [(place, index.parent.name)]
    files = sorted(path for path in folder.rglob("*") if path.suffix in LOADED and path.is_file())
    return [
        (path.relative_to(folder).as_posix(), file_hash(path))
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, remembered for large ones."""
    about = path.stat()
    if about.st_size < LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):  # the hub's cache: its own SHA-256
        return real.name
    state = [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    known = cache_folder() / "hashes" / f"{hash_values(str(real))}.json"
    try:
        remembered = load_json(known.read_text(encoding="utf-8"))
        if remembered["state"] == state:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        pass
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        atomic_text(known, json.dumps({"state": state, "sha256": found}) + "\n")
    except (RunError, OSError) as error:
        logger.debug("hash of %s is not remembered: %s", path, error)
    return found
