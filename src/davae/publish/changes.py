"""The change of a full fine-tuning, stored at a low rank or in 8 bits.

An upgrade file of such changes holds only for the base whose weights it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.backbones.family import Family
from davae.backbones.head_options import BUFFERS
from davae.errors import ModelError

logger = logging.getLogger(__name__)

UP, DOWN = ".change_up", ".change_down"  # after a weight's name: (m,r) and (r,n)
ROUNDED, STEPS = ".change_8bit", ".change_steps"  # (m,n) of int8, and (m,1) of float32
BITS = 8
MOST = 2 ** (BITS - 1) - 1
PROJECTIONS, PROJECTED = 4, 4096  # numbers of a base, from as many values of each weight
NEAR = 0.01  # of the weights' norm: rounding to half precision moves a projection by a thousandth of it
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Changes:
    """Note of an upgrade file that stores changes.

    Attributes:
        rank: r of the factors of each change; None where the changes are in 8 bits.
        kept: share of the squared change that the file keeps.
        base: `projections` of the base's changed weights.
    """

    rank: int | None
    kept: float
    base: tuple[float, ...]

    @property
    def key(self) -> str:
        """Name of the note in the metadata of a file."""
        return KEYS[self.rank is None]

    @property
    def note(self) -> dict[str, Any]:
        """Return what the metadata of a file keep."""
        size = {"bits": BITS} if self.rank is None else {"rank": self.rank}
        return {**size, "kept": self.kept, "base": self.base}


KEYS = ("low_rank", "rounded")  # entries of a file's metadata


def read_changes(key: str, values: Any) -> Changes:
    """Return the note of an upgrade file's metadata.

    Args:
        key: one of `KEYS`.
        values: its entry.

    Raises:
        ValueError: it is not what davae writes there.
    """
    entries = values if isinstance(values, dict) else {}
    kept, base = entries.get("kept"), entries.get("base")
    size = entries.get("rank" if key == KEYS[0] else "bits")
    numbers = [kept, *base] if isinstance(base, list) and len(base) == PROJECTIONS else []
    if type(size) is not int or size < 1 or not numbers or not all(type(one) is float for one in numbers):
        raise ValueError(f"{key} is {str(values)[:80]}, expected a size, a share and {PROJECTIONS} projections")
    if key == KEYS[1] and size != BITS:
        raise ValueError(f"{key} has changes in {size} bits, this davae reads {BITS}; update davae")
    return Changes(size if key == KEYS[0] else None, numbers[0], tuple(numbers[1:]))


def is_changed(name: str, shape: tuple[int, ...], rank: int | None, family: Family) -> bool:
    """Return whether a weight is stored as its change.

    A weight (m,...) counts as the matrix (m,n) of its rows, and has factors where r (m + n) < m n. What the pretrained model
    lacks stays whole: embedder and head, which have new channels, and modules of the detail.
    """
    new = family.embedder, family.head, *([] if family.detail_time is None else [family.detail_time])
    if len(shape) < 2 or name.startswith((BUFFERS, *(f"{path}." for path in new))):
        return False
    rows, columns = _matrix(shape)
    return rank is None or rank * (rows + columns) < rows * columns


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def stored_shapes(shapes: Shapes, changes: Changes | None, family: Family) -> Shapes:
    """Return names and shapes of an upgrade file's tensors, given those of the trained ones."""
    if changes is None:
        return shapes
    stored: Shapes = {}
    for name, shape in shapes.items():
        if not is_changed(name, shape, changes.rank, family):
            stored[name] = shape
            continue
        rows, columns = _matrix(shape)
        if changes.rank is None:
            stored |= {name + ROUNDED: (rows, columns), name + STEPS: (rows, 1)}
        else:
            stored |= {name + UP: (rows, changes.rank), name + DOWN: (changes.rank, columns)}
    return stored


def check_changes(shapes: Shapes, rank: int | None, family: Family) -> None:
    """Refuse a rank that makes no weight smaller, and an upgrade without matrices.

    Args:
        shapes: of an upgrade file's tensors, the weights themselves.
        rank: r of each change, or None for changes in 8 bits.
        family: of the transformer.

    Raises:
        ModelError: one of these.
    """
    if any(is_changed(name, shape, rank, family) for name, shape in shapes.items()):
        return
    if rank is None:
        raise ModelError("no weight of this upgrade is the change of a matrix; leave --bits out")
    raise ModelError(f"--rank {rank} makes no weight smaller; use a lower rank, or leave it out")


def as_changes(
    trained: Mapping[str, Tensor],
    pretrained: Mapping[str, Tensor],
    rank: int | None,
    family: Family,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], Changes]:
    """Return the tensors that store the changes of weights, and what they keep.

    Args:
        trained: tensors of the upgrade file by name.
        pretrained: values of the same names and shapes before training; only those of changed weights are read.
        rank: r of each change, or None for changes in 8 bits.
        family: of the transformer.
        dtype: of the factors.
        device: where the decompositions run; by default where `trained` is.

    Raises:
        ModelError: a rank at which no weight gets smaller, or a model without matrices.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    check_changes(shapes, rank, family)
    names = [name for name, shape in shapes.items() if is_changed(name, shape, rank, family)]
    found: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name in names:
        change = trained[name].detach().float() - pretrained[name].detach().to(trained[name].device).float()
        matrix = change.flatten(1)  # (m,n)
        if rank is None:
            parts = rounded(matrix)
            stored, near = {name + ROUNDED: parts[0], name + STEPS: parts[1]}, parts[0] * parts[1]
        else:
            up, down = (part.to(matrix.device) for part in factors(matrix.to(device or matrix.device), rank))
            stored, near = {name + UP: up.to(dtype), name + DOWN: down.to(dtype)}, up @ down
        found |= stored
        lost += float((matrix - near).double().square().sum())
        whole += float(matrix.double().square().sum())
    kept = 1.0 - lost / whole if whole else 1.0
    return found, Changes(rank, kept, projections(pretrained[name] for name in names))


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (m,r) and (r,n) of a change (m,n).

    They are the truncated singular value decomposition, the nearest matrix of that rank (Eckart and Young, 1936). Both carry
    the square root of the singular values, so that neither is too small for half precision.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)  # (m,k), (k,), (k,n)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def rounded(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return a change (m,n) rounded to int8, and the steps (m,1) of its rows.

    A step is 1/127 of the largest value of a row, and each value is off by half a step at most. Rows of normal values lose
    about 5e-5 of their squares.
    """
    steps = change.abs().amax(dim=1, keepdim=True) / MOST  # (m,1)
    return torch.round(change / steps.where(steps > 0, torch.ones_like(steps))).to(torch.int8), steps


def trained_value(name: str, stored: Mapping[str, Tensor], pretrained: Tensor) -> Tensor:
    """Return a trained tensor: what the file stores, or the pretrained value plus its change.

    Raises:
        ModelError: a change that is not finite.
    """
    if name in stored:
        return stored[name]
    ends = (UP, DOWN) if name + UP in stored else (ROUNDED, STEPS)
    one, other = (stored[name + end].to(pretrained.device).float() for end in ends)
    change = one @ other if ends[0] == UP else one * other  # (m,n)
    value = pretrained.detach().float() + change.view(pretrained.shape)  # (m,...)
    if not bool(torch.isfinite(value).all()):
        raise ModelError(f"the change of {name} is not finite; the upgrade file is damaged, copy or export it again")
    return value


def projections(weights: Iterable[Tensor]) -> tuple[float, ...]:
    """Return projections of weights relative to their norm, which differ in another training.

    Rounding to another precision hardly changes them, as it would a hash. The first values of each weight are enough, so that
    a large model is not read once more when it is loaded.
    """
    sums, norm = torch.zeros(PROJECTIONS, dtype=torch.float64), 0.0
    for weight in weights:
        values = weight.detach().flatten()[:PROJECTED].cpu().double()  # (n,)
        places = torch.arange(1, len(values) + 1, dtype=torch.float64)
        sums += torch.stack([values @ torch.cos((number + 1) * places) for number in range(PROJECTIONS)])
        norm += float(values.square().sum())
    return tuple((sums / max(norm, 1e-30) ** 0.5).tolist())


def compare_base(path: Path, changes: Changes, pretrained: Mapping[str, Tensor], family: Family) -> None:
    """Warn of a base whose weights are not those that an upgrade file changes, in any precision."""
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained.items()}
    found = projections(pretrained[name] for name in shapes if is_changed(name, shapes[name], changes.rank, family))
    if max(abs(one - other) for one, other in zip(found, changes.base, strict=True)) > NEAR:
        logger.warning(
            "%s has the changes of another base's weights, images may be wrong; take the base it was exported with",
            path,
        )
