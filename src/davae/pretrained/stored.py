"""Models in untrusted folders, checked before they take memory and after they are loaded.

A config is data that decides how much is allocated. So its numbers are bounded, what is built from it may hold no more
than the weights do, and weights and config must belong together: nothing missing, nothing left over, all finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import diffusers
import torch
import transformers
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules import module as hooks

from davae.backbones.classes_by_name import model_class
from davae.errors import DavaeError, ModelError
from davae.files.reading import read_object
from davae.pretrained.hub_errors import brief, hub_answers
from davae.zoo import split_revision

MOST_PARAMETERS = 200 * 10**9  # of a model that is only planned; the largest known has 20e9
MOST_MODULES = 200_000
MOST_REPEATS = 4096  # layers, blocks, heads of one kind
MOST_ENTRIES = 100_000  # of a list, such as one shift for each channel
LARGEST_TABLE = 4 * 10**8  # numbers in a table of positions; that of SD3.5 Medium has 2.3e8
LARGEST_SIDE = 16_384  # pixels, latent positions or tokens
SIDES = ("sample_size", "pos_embed_max_size", "height", "width", "shortest_edge", "longest_edge")
MOST = {**dict.fromkeys(SIDES, LARGEST_SIDE), "num_train_timesteps": 100_000}
ROOM = 64 * 2**20  # numbers that a model may hold besides its file: tables of positions
STATISTICS = (
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    *("base_mean", "base_std", "detail_mean", "detail_std"),
)
# tensors of earlier versions of a class, which its official weights still hold; the last is PixArt's
OLD_BUFFERS = re.compile(
    r"(position_ids|inv_freq|num_batches_tracked|masked_bias)$|^lm_head\.|^caption_projection\.y_embedding$"
)
VARIANT = re.compile(r"\w+(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")  # model.fp16.safetensors
# what library code raises when a config or a file does not hold what it expects
LIBRARY_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, SafetensorError,
)  # fmt: skip


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what a library raises over a folder's content into one line.

    Raises:
        ModelError: names `what` and the reason.
    """
    try:
        yield
    except DavaeError:
        raise
    except MemoryError as error:
        raise ModelError(f"{what} does not fit into memory; use a smaller model or a larger machine") from error
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{what} cannot be loaded: {brief(error, 300)}") from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises it bare over a damaged file
            raise
        raise ModelError(f"{what} cannot be loaded: {brief(error, 300)}") from error


# -- what JSON files may contain ---------------------------------------------------------------------------------------


def check_config(config: Any, what: str) -> None:
    """Refuse numbers that no model has, before anything is built from them.

    Raises:
        ModelError: names the entry.
    """
    if not isinstance(config, dict):
        raise ModelError(f"{what}: found a {type(config).__name__} where a JSON object belongs")
    for key, value in config.items():
        _check_entry(str(key), value, what, 0)
    for key in STATISTICS:
        values = config.get(key)
        for channel, number in enumerate(values if isinstance(values, list) else [] if values is None else [values]):
            divides = key == "scaling_factor" or key.endswith("_std")
            if not isinstance(number, (int, float)) or not math.isfinite(number) or (divides and number <= 0):
                found = f"{str(number)[:40]} at channel {channel}" if isinstance(values, list) else str(number)[:40]
                wanted = "finite and positive" if divides else "finite"
                raise ModelError(
                    f"{what}: {key}: found {found}; it must be {wanted}, for latents are normalised by it"
                )
    sides = ["sample_size", "pos_embed_max_size", "input_size"]
    if "num_mmdit_layers" in config:  # AuraFlow's pos_embed_max_size counts positions, not those of a side
        sides.remove("pos_embed_max_size")
    side = max(_first(config.get(key)) for key in sides)
    width = max(
        _first(config.get("num_attention_heads")) * _first(config.get("attention_head_dim")),
        *(_first(config.get(key)) for key in ("hidden_size", "caption_projection_dim")),
    )
    patch = max(1, _first(config.get("patch_size")))
    if (side // patch) ** 2 * width > LARGEST_TABLE:
        raise ModelError(f"{what}: its table of {side // patch} x {side // patch} positions would take all memory")


def _first(value: Any) -> int:
    """Return a whole number, or the largest in a list, 0 for anything else."""
    if isinstance(value, list):
        return max((_first(one) for one in value), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _check_entry(key: str, value: Any, what: str, depth: int) -> None:
    if depth > 8:
        raise ModelError(f"{what}: {key} is nested more than 8 levels deep")
    if isinstance(value, (list, dict)):
        if len(value) > MOST_ENTRIES:
            raise ModelError(f"{what}: {key} has {len(value)} entries, more than {MOST_ENTRIES}")
        for name, one in value.items() if isinstance(value, dict) else ((key, one) for one in value):
            _check_entry(str(name), one, what, depth + 1)
    elif isinstance(value, int):
        repeats = re.search(r"(^|_)(num_)?(layers?|depths?|blocks|heads)(_|$)", key) is not None
        most = MOST_REPEATS if repeats else MOST.get(key, 2**31)
        if abs(value) > most:
            raise ModelError(f"{what}: {key} is {value}, more than {most}; the config is damaged")


# -- how much is built -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Most that the construction of a model may register.

    Attributes:
        parameters: numbers in parameters.
        buffers: numbers in buffers, such as tables of positions.
        modules: modules of all kinds.
    """

    parameters: int = MOST_PARAMETERS
    buffers: int = MOST_PARAMETERS
    modules: int = MOST_MODULES


@contextmanager
def bounded(bound: Bound, what: str) -> Iterator[None]:
    """Stop the construction of modules that hold more than a bound.

    Raises:
        ModelError: names `what` and how much its config would allocate.
    """
    held = {"parameters": 0, "buffers": 0, "modules": 0}

    def count(kind: str) -> Callable[[nn.Module, str, Any], None]:
        most = getattr(bound, kind)

        def registered(module: nn.Module, name: str, value: Any) -> None:
            held[kind] += value.numel() if isinstance(value, torch.Tensor) else 1
            if held[kind] > most:
                raise ModelError(
                    f"{what}: its config asks for more than {most} numbers or modules ({kind}), far more than its weights "
                    "hold; the config is damaged or belongs to another model"
                )

        return registered

    with ExitStack() as stack:
        for register, kind in (
            (hooks.register_module_parameter_registration_hook, "parameters"),
            (hooks.register_module_buffer_registration_hook, "buffers"),
            (hooks.register_module_module_registration_hook, "modules"),
        ):
            stack.callback(register(count(kind)).remove)
        yield


@contextmanager
def planned(what: str) -> Iterator[None]:
    """Build modules without weights on the meta device, bounded, with one-line errors.

    Raises:
        ModelError: a config that its class cannot take, or one of absurd size.
    """
    with loading(what), bounded(Bound(), what), torch.device("meta"):
        yield


# -- what weights hold -------------------------------------------------------------------------------------------------


def weight_files(folder: Path, what: str) -> list[Path]:
    """Return the safetensors files of a component's folder, as its index lists them.

    Raises:
        ModelError: none, pickled ones only, or an index with a name that is not a file of this folder.
    """
    files: dict[str, None] = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index}: 'weight_map' is not a list of tensors and their files; the file is damaged")
        for name in names.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}: {name[:120]!r} is not a .safetensors file of this folder")
            if not (folder / name).is_file():
                raise ModelError(f"{index}: {name} is missing; download the model again")
            files[name] = None
    found = [folder / name for name in files] or sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = next((p for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")), None)
        if pickled is not None:
            raise ModelError(
                f"{what}: {pickled.name} is a pickle, which can run code when it is read; save the model as safetensors"
            )
        raise ModelError(f"{what} cannot be loaded: no .safetensors file in {folder}")
    return found


def stored_variants(model: str, parts: Iterable[str]) -> dict[str, str | None]:
    """Return the variant, such as fp16, of each part with weights, None for plain ones."""
    files = [PurePosixPath(file) for file in _files(model) if file.endswith(".safetensors")]
    named = {part: [VARIANT.match(f.name) for f in files if f.parent == PurePosixPath(part)] for part in parts}
    return {part: min(m[1] for m in found if m) if all(found) else None for part, found in named.items() if found}


def _files(model: str) -> Iterable[str]:
    """Return relative names of a model's files, by the hub where it answers, else by its cache."""
    folder, (name, revision) = Path(model), split_revision(model)
    if not folder.is_dir():
        with suppress(HTTPError):
            if hub_answers():
                return list_repo_files(name, revision=revision)
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    return [file.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in folder.glob(depth)]


def stored_bound(files: list[Path], what: str) -> Bound:
    """Return the most that a model for these safetensors files may hold, from their headers.

    Raises:
        ModelError: a damaged header, or weights that are not floating-point numbers.
    """
    total = tensors = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 - no mapping
                    part = stream.get_slice(name)
                    total, tensors = total + math.prod(part.get_shape()), tensors + 1
                    if name.endswith((".weight", ".bias")) and "F" not in part.get_dtype():
                        raise ModelError(f"{what}: {name} is stored as {part.get_dtype()}; davae reads float weights")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{what}: {file} is damaged ({error}); download it again") from error
    return Bound(total * 3 // 2 + 2**20, total + ROOM, 2000 + 20 * tensors)


def check_whole(info: dict[str, Any], what: str) -> None:
    """Refuse a model whose config and weights do not belong together.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` reports.

    Raises:
        ModelError: tensors that are missing, left over or of another shape; names one of each.
    """
    missing = sorted(str(name) for name in info.get("missing_keys") or ())
    others = [str(name) for name in info.get("unexpected_keys") or () if not OLD_BUFFERS.search(str(name))]
    shapes = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    faults = [
        text.format(names[0][:120] + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
        for text, names in (
            ("the weights lack {}", missing),
            ("the weights hold {}, which the config does not ask for", sorted(others)),
            ("{} has another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ModelError(f"{what}: {'; '.join(faults)}: config and weights do not belong together")


def check_finite(model: nn.Module, what: str) -> None:
    """Refuse weights and statistics that are not finite.

    Raises:
        ModelError: names a tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{what}: the weights lack {name}: config and weights do not belong together")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise ModelError(f"{what}: {name} contains NaN or infinite values; the weights are damaged")


# -- loading -----------------------------------------------------------------------------------------------------------


def component_class(entry: Any) -> Any:
    """Return the model class of a model_index.json entry, None for parts without weights."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        return None
    library, name = entry
    kind = getattr(transformers, name, None) if library == "transformers" else None
    if library in ("diffusers", "davae"):
        kind = model_class(name)
    is_model = isinstance(kind, type) and issubclass(kind, (diffusers.ModelMixin, transformers.PreTrainedModel))
    return kind if is_model else None


def check_component(folder: Path, what: str) -> Bound:
    """Check a model's config and the headers of its weights, and return its bounds.

    Raises:
        ModelError: what no model has in its config, or weights that are missing, pickled, damaged or not floats.
    """
    check_config(read_object(folder / "config.json"), what)
    return stored_bound(weight_files(folder, what), what)


def load_component(model: str, part: str, kind: Any, dtype: torch.dtype, what: str = "") -> Any:
    """Load one model of a folder or hub id, in eval mode.

    Args:
        part: its folder in the model; "" for the model itself.
        kind: its class, of diffusers, transformers or davae.
        what: how to call it in messages.

    Raises:
        ModelError: a config that does not fit the weights, pickled, damaged or non-finite weights.
    """
    what = what or f"{f'{part} of ' if part else ''}model {model}"
    folder = Path(model) / part
    bound = check_component(folder, what) if folder.is_dir() else Bound()
    name, revision = split_revision(model)
    options: dict[str, Any] = {"revision": revision or "main"} | ({"subfolder": part} if part else {})
    if kind.__module__.startswith("transformers."):
        options |= {"dtype": dtype, "trust_remote_code": False}
    else:
        options["torch_dtype"] = dtype
    with loading(what), bounded(bound, what):
        options["variant"] = stored_variants(model, [part]).get(part)
        loaded, info = cast(Any, kind).from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **options
        )
    check_whole(info, what)
    check_finite(loaded, what)
    return loaded.eval()


def load_components(folder: Path, model: str, dtype: torch.dtype, without: tuple[str, ...]) -> dict[str, Any]:
    """Load every model of a pipeline's folder, after all of them are checked.

    Args:
        model: the pipeline's name in messages.
        without: components to leave out.

    Raises:
        ModelError: as `load_component`, and a folder that is missing.
    """
    index = read_object(folder / "model_index.json")
    kinds = {part: component_class(entry) for part, entry in index.items() if part not in without}
    for part, entry in index.items():
        if isinstance(entry, list) and part not in without and entry[:1] != [None] and part != "_class_name":
            scheduler = folder / part / "scheduler_config.json"
            if kinds[part] is not None:
                if not (folder / part).is_dir():
                    raise ModelError(f"model {model} has no folder {part}, which its model_index.json names")
                check_component(folder / part, f"{part} of model {model}")
            elif scheduler.is_file():
                check_config(read_object(scheduler), f"{part} of model {model}")
    return {
        part: load_component(str(folder), part, kind, dtype, f"{part} of model {model}")
        for part, kind in kinds.items()
        if kind is not None
    }
