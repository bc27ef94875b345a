"""Figures of `davae inspect`, read where they were counted before.

Counting takes up to minutes.

Known models' figures ship with davae (`zoo/counts.json`, made by benchmarks/counts.py). Others are kept in the user's cache
folder. Reading them loads no torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from davae.errors import RunError
from davae.files.atomic import atomic_text
from davae.files.reading import load_json
from davae.zoo import FOLDER, resolve
from davae.zoo.presets import presets

logger = logging.getLogger(__name__)

SHIPPED = FOLDER / "counts.json"
PLACE = "DAVAE_CACHE"  # environment variable: the folder in which figures are kept
COUNTED_BY = ("torch", "diffusers", "transformers", "peft")  # their versions may change what is counted
READ_WHOLE = 1 << 20  # bytes; larger JSON files are vocabularies


def inspected_figures(
    model: str,
    resolution: int | None = None,
    scale: int = 2,
    detail_channels: int | None = None,
    steps: int | None = None,
    watch: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:
    """Return the JSON of `davae inspect`: figures of the model and phases of its upgrade.

    Args:
        model, resolution, scale, detail_channels, steps: as `inspect_model` takes them.
        watch: called with the name of each part before it is counted.

    Raises:
        ModelError: as `inspect_model`.
    """
    configs = config_fingerprint(model)
    if configs is None:
        return count_figures(model, resolution, scale, detail_channels, steps, watch)
    key = request_key(configs, resolution, scale, detail_channels)
    values = _shipped().get(key) or _kept(key)
    if values is None:
        values = count_figures(model, resolution, scale, detail_channels, None, watch)
        for same in {key, request_key(configs, values["resolution"], scale, detail_channels)}:
            _keep(same, values)
    return values if steps is None else values | picture_figures(values, steps)


def count_figures(
    model: str,
    resolution: int | None,
    scale: int,
    detail_channels: int | None,
    steps: int | None,
    watch: Callable[[str], None],
) -> dict[str, Any]:
    """Return the figures of `inspected_figures`, counted anew."""
    watch("reading configs")
    from davae.plan.inspect import inspect_model, inspected_phases

    found = inspect_model(model, resolution, scale, detail_channels, steps, watch=watch)
    watch("phases of an upgrade")
    phases = inspected_phases(found)
    values = found.as_dict() | ({} if phases is None else phases.as_dict() | {"notes": found.notes})
    return json.loads(json.dumps(values))


def picture_figures(values: dict[str, Any], steps: int) -> dict[str, float]:
    """Return the figures of a whole image that depend on the number of sampling steps.

    Args:
        values: `passes_per_step`, `text_flops`, and FLOPs of a pass and of decoding, native and upgraded.
    """
    if "bound" not in values:
        return {"steps": steps}
    native, upgraded = (
        values["text_flops"]
        + steps * values["passes_per_step"] * values[f"{name}_flops"]
        + values[f"{name}_vae_decode_flops"]
        for name in ("native", "upgraded")
    )
    return {
        "steps": steps,
        "native_picture_flops": native,
        "upgraded_picture_flops": upgraded,
        "picture_bound": native / upgraded,
    }


# -- keys ------------------------------------------------------------------------------------------------------------


def config_fingerprint(model: str) -> str | None:
    """Return a hash of a model's name and configs, None where they are not on this machine."""
    folder = Path(resolve(model))
    if folder.is_dir():
        files = [path for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern)]
        content: Any = [
            (path.relative_to(folder).as_posix(), _content(path)) for path in sorted(files) if path.is_file()
        ]
    elif model in presets():
        content = asdict(presets()[model])
    else:
        return None
    return _hash([model, content])


def _content(path: Path) -> str:
    size = path.stat().st_size
    return sha256(path.read_bytes()).hexdigest() if size <= READ_WHOLE else f"{size} bytes"


def request_key(configs: str, resolution: int | None, scale: int, detail_channels: int | None) -> str:
    """Return the key of one request, for every number of sampling steps."""
    return _hash([configs, resolution, scale, detail_channels])


def _hash(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


# -- figures that were counted before ---------------------------------------------------------------------------------


def _shipped() -> dict[str, Any]:
    return load_json(SHIPPED.read_bytes())


def _path(key: str) -> Path:
    """Return the file that keeps a request's figures, named by everything that counts."""
    root = Path(__file__).parents[1]
    code = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(root.glob("*/**/*.py"))]
    name = _hash([key, [version(package) for package in COUNTED_BY], code])
    place = os.environ.get(PLACE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "davae"
    return Path(place) / "inspect" / f"{name}.json"


def _kept(key: str) -> dict[str, Any] | None:
    path = _path(key)
    try:
        values = load_json(path.read_bytes())
        return values if values["model"] and values["resolution"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is damaged; it is counted again", path)
        return None


def _keep(key: str, values: dict[str, Any]) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(path, json.dumps(values))
    except (OSError, RunError) as error:  # a folder that cannot be written costs time, nothing else
        logger.info("figures are not kept: %s", error)
