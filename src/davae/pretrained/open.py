"""Open diffusers pipelines: their files, configs, parts, and the whole."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from davae.backbones.classes_by_name import model_class
from davae.errors import ModelError
from davae.files.checksums import check_folder
from davae.files.reading import read_object
from davae.homes import HOMES
from davae.pretrained.hub_errors import hub_answers, hub_reason
from davae.pretrained.processors import check_tokenizers
from davae.pretrained.stored import check_config, load_component, load_components, loading, stored_variants
from davae.zoo import SHIPPED, split_revision
from davae.zoo.presets import nearest_models, presets

LIBRARIES = ("diffusers", "transformers", "davae")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./+-]+)?")  # with a revision or without
OURS = ("models/", "runs/")  # folders of the pages


class MissingPart(ModelError):
    """A folder or hub model that exists, without the file that was asked for."""


def fetch_file(model: str, part: str, filename: str) -> Path:
    """Return the path of one file of a diffusers folder or hub id, downloaded if needed.

    Args:
        model: folder or hub id, ORGANISATION/NAME or ORGANISATION/NAME@REVISION.
        part: folder of the file in it; "" for the top.
        filename: name of the file.

    Raises:
        ModelError: the file is not there.
    """
    local = Path(model)
    if local.is_dir():
        path = local / part / filename
        if not path.is_file():
            raise MissingPart(f"model {model} has no {Path(part) / filename}: not a diffusers folder")
        return path
    if local.is_file():
        raise ModelError(
            f"model {model} is a single file, and davae reads diffusers folders; make one in Python with the class it is "
            f"for, such as StableDiffusion3Pipeline: CLASS.from_single_file({model!r}).save_pretrained(FOLDER)"
        )
    if model in SHIPPED:
        raise ModelError(
            f"model '{model}' is an upgraded model without a folder of its own; give its base, {SHIPPED[model]}, or make a "
            f"folder with `davae apply {model} --base {SHIPPED[model]} --out FOLDER`"
        )
    name, revision = split_revision(model)
    if revision and Path(name).is_dir():  # its weights would be loaded as those of any revision
        raise ModelError(f"model {model}: {name} is a folder here, without revisions; give {name}, or rename it")
    check_model_name(model)
    from huggingface_hub import errors, hf_hub_download

    try:
        options = {"revision": revision, "local_files_only": not hub_answers()}
        return Path(hf_hub_download(name, filename, subfolder=part or None, **options))
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.EntryNotFoundError, OSError) as error:
        unreached = isinstance(error, errors.LocalEntryNotFoundError)
        absent = isinstance(error, errors.EntryNotFoundError) and not unreached
        raise (MissingPart if absent else ModelError)(
            f"model '{model}' is not a folder here, and the hub did not give it: {hub_reason(error, model)}"
        ) from error


def check_model_name(model: str, weights: bool = False) -> None:
    """Refuse the name of no folder here that cannot be on the hub either.

    Args:
        model: as a user gave it.
        weights: whether they are to be loaded, so that a preset would not do.

    Raises:
        ModelError: names what was looked for, and the nearest known models.
    """
    if HUB_ID.fullmatch(model) and not model.startswith(OURS):
        return
    if "/" in model:
        raise ModelError(
            f"model '{model}': there is no such folder here; give a run's folder, a diffusers folder or a hub id "
            "(ORGANISATION/NAME)"
        )
    near = nearest_models(model, with_presets=not weights)
    question = f"; did you mean {' or '.join(near)}?" if near else "" if weights else ";"
    listed = "" if weights else " `davae inspect` lists the presets"
    known = "an embedded model" if weights else "a preset"
    raise ModelError(
        f"model '{model}' is not a folder here, {known} or a hub id (ORGANISATION/NAME){question}{listed}"
    )


def read_config(model: str, part: str, filename: str = "config.json") -> dict[str, Any]:
    """Return one JSON file of a diffusers folder, hub id or preset.

    Args:
        model: folder, hub id or preset.
        part: folder of the file in it; "" for the top.
        filename: name of the file.

    Raises:
        ModelError: the file is not there.
    """
    if not Path(model).is_dir() and model in presets():
        config = presets()[model].config(part, filename)
        if config is None:
            raise MissingPart(f"preset {model} has no {Path(part) / filename}")
        return config
    config = read_object(fetch_file(model, part, filename))
    if filename == "model_index.json":
        check_index(config, model)
    return config


def check_index(index: dict[str, Any], model: str) -> None:
    """Refuse a model_index.json that names places outside its folder or unknown code.

    Raises:
        ModelError: names the entry.
    """
    where = f"model {model}: model_index.json"
    own = index.get("_class_name", "DiffusionPipeline")
    name = own[-1] if isinstance(own, list) and own else own
    if not isinstance(name, str):
        raise ModelError(f"{where}, _class_name: found {str(own)[:80]}, expected the name of a pipeline class")
    for part, entry in index.items():
        if not isinstance(entry, list) or part == "_class_name" or part in _options(name):
            continue
        if not part.isidentifier():
            raise ModelError(f"{where}: {part[:80]!r} is not the name of a component")
        if len(entry) != 2 or not all(one is None or isinstance(one, str) for one in entry):
            raise ModelError(f"{where}, {part}: found {str(entry)[:80]}, expected a library and a class")
        library, kind = entry
        known = library in LIBRARIES or kind in HOMES or hasattr(diffusers.pipelines, str(library))
        if library is not None and not known:
            raise ModelError(
                f"{where}, {part}: found the library {library[:80]!r}; davae loads classes of {', '.join(LIBRARIES)}"
            )


def _options(pipeline: str) -> set[str]:
    """Return the names of a pipeline's plain options, which are not components."""
    try:
        kind = model_class(pipeline)
    except ValueError:
        return set()
    arguments = inspect.signature(kind.__init__).parameters.values()
    optional = set(getattr(kind, "_optional_components", ()))
    return {one.name for one in arguments if one.default is not inspect.Parameter.empty and one.name not in optional}


class Configs:
    """JSON files of a diffusers folder, hub id or preset, each read once.

    Args:
        model: the folder, hub id or preset.
    """

    def __init__(self, model: str):
        self.model = model
        self._read: dict[tuple[str, str], dict[str, Any]] = {}

    @classmethod
    def of(cls, model: str | Configs) -> Configs:
        """Return the files of a model that is named, or those that are being read already."""
        return cls(model) if isinstance(model, str) else model

    def read(self, part: str, filename: str = "config.json") -> dict[str, Any]:
        """Return one file.

        Raises:
            ModelError: the model has no file of that name.
        """
        if (part, filename) not in self._read:
            self._read[part, filename] = read_config(self.model, part, filename)
        return self._read[part, filename]

    @property
    def index(self) -> dict[str, Any]:
        """The pipeline's model_index.json."""
        return self.read("", "model_index.json")


def load_scheduler(model: str | Configs) -> Any:
    """Return the scheduler of a model, built from its config, None where it has none.

    Raises:
        ModelError: a class that diffusers does not have.
    """
    configs = Configs.of(model)
    name = (configs.index.get("scheduler") or (None, None))[1]
    if name is None:
        return None
    with loading(what := f"scheduler of model {configs.model}"):
        kind, config = model_class(name), configs.read("scheduler", "scheduler_config.json")
        check_config(config, what)
        return kind.from_config(dict(config))


def load_part(model: str, part: str, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load one model of a diffusers folder or hub id, without the rest of the pipeline.

    Raises:
        ModelError: when diffusers cannot load it.
    """
    check_folder(Path(model), part)
    return load_component(model, part, model_class(class_name), dtype)


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, without: tuple[str, ...] = ()) -> Any:
    """Load the stock diffusers pipeline of a folder or hub id, progress bars off.

    Args:
        without: components that are left out (None in the pipeline), so that they take no memory.

    Raises:
        ModelError: when diffusers cannot load it.
    """
    if model in presets() and not Path(model).is_dir():
        weights = presets()[model].hub or "its official weights, made a folder by `davae convert`"
        raise ModelError(f"model {model} is a preset, configs without weights; give {weights}")
    if model not in SHIPPED and not Path(model).exists():
        check_model_name(model, weights=True)
    index = read_config(model, "", "model_index.json")
    name = class_name(index.get("_class_name", "DiffusionPipeline"))
    check_folder(Path(model), without=without)
    # diffusers takes a part that the index has as null for forgotten, unless it is passed as None
    without = (*without, *(part for part, entry in index.items() if entry == [None, None]))
    with loading(what := f"model {model}"), without_own_code(model, index) as folder, warnings.catch_warnings():
        # `dtype`, its new name, is unknown to the oldest diffusers that davae takes
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        kind = model_class(name)
        if not Path(folder).is_dir():
            folder = _download(kind, model, stored_variants(model, (p for p in index if p not in without)), without)
        parts = dict.fromkeys(without) | load_components(Path(folder), model, dtype, without)
        variant = next(filter(None, stored_variants(folder, (p for p in index if p not in parts)).values()), None)
        pipeline = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, variant=variant, **parts)
    check_tokenizers(pipeline, what)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _download(kind: Any, model: str, variants: dict[str, str | None], without: tuple[str, ...]) -> str:
    """Download each part in its own variant: diffusers takes one wherever it finds it."""
    place, revision = split_revision(model)
    options, folder = {"use_safetensors": True, "revision": revision}, ""
    for variant in dict.fromkeys(variants.values()) or [None]:
        left = (*without, *(part for part, own in variants.items() if own != variant))
        folder = str(kind.download(place, variant=variant, **options, **dict.fromkeys(left)))
    return folder


def class_name(entry: Any) -> str:
    """Return the class that an entry of a model_index.json names."""
    return entry[-1] if isinstance(entry, list) else entry


@contextmanager
def without_own_code(model: str, index: dict[str, Any]) -> Iterator[str]:
    """Yield the model, or a folder in its place that names the installed davae.

    A folder of `davae export --self-contained` brings davae's code along; no code is read from it.

    Args:
        index: its model_index.json.

    Raises:
        ModelError: such a model on the hub.
    """
    known = (None, "diffusers", "transformers", "davae")
    own = [k for k, v in index.items() if isinstance(v, list) and v[0] not in known and v[-1] in HOMES]
    if not own:
        yield model
        return
    if not Path(model).is_dir():
        raise ModelError(f"model {model} brings davae's code along; download it, and give its folder")
    here = {k: class_name(index[k]) if k == "_class_name" else ["davae", index[k][-1]] for k in own}
    with tempfile.TemporaryDirectory() as scratch:
        for part in Path(model).iterdir():
            if part.is_dir():
                (Path(scratch) / part.name).symlink_to(Path(os.path.realpath(part)))
        (Path(scratch) / "model_index.json").write_text(json.dumps(index | here), encoding="utf-8")
        yield scratch
