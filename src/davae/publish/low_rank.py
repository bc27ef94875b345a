"""The change of a full fine-tuning at a low rank.

An upgrade file of such changes is nearly as small as that of a LoRA where most weights are matrices. It holds only for the
base whose weights it changes.
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
PROJECTIONS, PROJECTED = 4, 4096  # numbers of a base, from as many values of each weight
NEAR = 0.01  # of the weights' norm: rounding to half precision moves a projection by a thousandth of it
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LowRank:
    """Note in a file of such changes.

    Attributes:
        rank: r of each factored change.
        kept: share of the squared change of the factored weights that the factors keep.
        base: `projections` of the base's factored weights.
    """

    rank: int
    kept: float
    base: tuple[float, ...]


def read_low_rank(values: Any) -> LowRank:
    """Return the note of an upgrade file's metadata.

    Raises:
        ValueError: it is not what `factor` leaves.
    """
    entries = values if isinstance(values, dict) else {}
    rank, kept, base = entries.get("rank"), entries.get("kept"), entries.get("base")
    numbers = [kept, *base] if isinstance(base, list) and len(base) == PROJECTIONS else []
    if type(rank) is not int or rank < 1 or not numbers or not all(type(one) is float for one in numbers):
        raise ValueError(f"low_rank is {str(values)[:80]}, expected a rank, a share and {PROJECTIONS} projections")
    return LowRank(rank, numbers[0], tuple(numbers[1:]))


def is_factored(name: str, shape: tuple[int, ...], rank: int, family: Family) -> bool:
    """Return whether a weight's change is stored as two factors.

    A weight (m,...) counts as the matrix (m,n) of its rows, and is factored where r (m + n) < m n. What the pretrained model
    lacks stays whole: embedder and head, which have new channels, and modules of the detail.
    """
    new = family.embedder, family.head, *([] if family.detail_time is None else [family.detail_time])
    if len(shape) < 2 or name.startswith((BUFFERS, *(f"{path}." for path in new))):
        return False
    rows, columns = _matrix(shape)
    return rank * (rows + columns) < rows * columns


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def stored_shapes(shapes: Shapes, rank: int | None, family: Family) -> Shapes:
    """Return names and shapes of an upgrade file's tensors, given those of the trained ones."""
    if rank is None:
        return shapes
    stored: Shapes = {}
    for name, shape in shapes.items():
        if is_factored(name, shape, rank, family):
            rows, columns = _matrix(shape)
            stored |= {name + UP: (rows, rank), name + DOWN: (rank, columns)}
        else:
            stored[name] = shape
    return stored


def factor(
    trained: Mapping[str, Tensor],
    pretrained: Mapping[str, Tensor],
    rank: int,
    family: Family,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], LowRank]:
    """Return the tensors of an upgrade file, and what they keep.

    The factors are the truncated singular value decomposition, the nearest matrix of that rank (Eckart and Young, 1936). Both
    carry the square root of the singular values, so that neither is too small for half precision.

    Args:
        trained: tensors of the upgrade file by name.
        pretrained: values of the same names and shapes before training; only those of factored weights are read.
        rank: r of each factored change.
        family: of the transformer.
        device: where the decompositions run; by default where `trained` is.

    Raises:
        ModelError: a rank at which no weight gets smaller.
    """
    found: dict[str, Tensor] = {}
    factored = dict.fromkeys(name for name, t in trained.items() if is_factored(name, tuple(t.shape), rank, family))
    if not factored:
        raise ModelError(f"--rank {rank} makes no weight smaller; use a lower rank, or leave it out")
    kept = whole = 0.0
    for name, tensor in trained.items():
        if name not in factored:
            found[name] = tensor
            continue
        change = (tensor.detach().float() - pretrained[name].detach().to(tensor.device).float()).flatten(1)  # (m,n)
        left, values, right = torch.linalg.svd(
            change.to(device or change.device), full_matrices=False
        )  # (m,k), (k,), (k,n)
        root = values[:rank].sqrt()
        found[name + UP] = (left[:, :rank] * root).to(tensor.device)
        found[name + DOWN] = (root[:, None] * right[:rank]).to(tensor.device)
        squares = values.double().square()
        kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
    return found, LowRank(rank, kept / whole if whole else 1.0, projections(pretrained[name] for name in factored))


def trained_value(name: str, stored: Mapping[str, Tensor], pretrained: Tensor) -> Tensor:
    """Return a trained tensor: what the file stores, or the pretrained value plus its change.

    Raises:
        ModelError: a change that is not finite.
    """
    if name + UP not in stored:
        return stored[name]
    up, down = (stored[name + end].to(pretrained.device).float() for end in (UP, DOWN))
    value = pretrained.detach().float() + (up @ down).view(pretrained.shape)  # (m,...)
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


def compare_base(path: Path, low_rank: LowRank, pretrained: Mapping[str, Tensor], family: Family) -> None:
    """Warn of a base whose weights are not those that an upgrade file changes, in any precision."""
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained.items()}
    found = projections(pretrained[name] for name in shapes if is_factored(name, shapes[name], low_rank.rank, family))
    if max(abs(one - other) for one, other in zip(found, low_rank.base, strict=True)) > NEAR:
        logger.warning(
            "%s has the changes of another base's weights, images may be wrong; take the base it was exported with",
            path,
        )
