"""The change of a full fine-tuning at a low rank.

An upgrade file of such changes is as small as that of a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from davae.backbones.family import Family
from davae.backbones.head_options import BUFFERS

UP, DOWN = ".change_up", ".change_down"  # after a weight's name: (m,r) and (r,n)
Shapes = dict[str, tuple[int, ...]]


def is_factored(name: str, shape: tuple[int, ...], rank: int, family: Family) -> bool:
    """Return whether a weight's change is stored as two factors.

    These are matrices (m,n) with r (m + n) < m n. What the pretrained model lacks stays whole: embedder and head, which have
    new channels, and modules of the detail.
    """
    new = family.embedder, family.head, *([] if family.detail_time is None else [family.detail_time])
    if len(shape) != 2 or name.startswith((BUFFERS, *(f"{path}." for path in new))):
        return False
    return rank * sum(shape) < shape[0] * shape[1]


def stored_shapes(shapes: Shapes, rank: int | None, family: Family) -> Shapes:
    """Return names and shapes of an upgrade file's tensors, given those of the trained ones."""
    if rank is None:
        return shapes
    stored: Shapes = {}
    for name, shape in shapes.items():
        if is_factored(name, shape, rank, family):
            stored |= {name + UP: (shape[0], rank), name + DOWN: (rank, shape[1])}
        else:
            stored[name] = shape
    return stored


def factor(
    trained: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], rank: int, family: Family
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of an upgrade file, and the share of the squared change they keep.

    The factors are the truncated singular value decomposition, the nearest matrix of that rank (Eckart and Young, 1936). Both
    carry the square root of the singular values, so that neither is too small for half precision.

    Args:
        trained: tensors of the upgrade file by name.
        pretrained: values of the same names before training; only those of factored weights are read.
        rank: r of each factored change.
        family: of the transformer.
    """
    found: dict[str, Tensor] = {}
    kept = whole = 0.0
    for name, tensor in trained.items():
        if not is_factored(name, tuple(tensor.shape), rank, family):
            found[name] = tensor
            continue
        change = tensor.float() - pretrained[name].detach().to(tensor.device).float()  # (m,n)
        left, values, right = torch.linalg.svd(change, full_matrices=False)  # (m,k), (k,), (k,n)
        root = values[:rank].sqrt()
        found |= {name + UP: left[:, :rank] * root, name + DOWN: root[:, None] * right[:rank]}
        squares = values.double().square()
        kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
    return found, kept / whole if whole else 1.0


def add_changes(stored: Mapping[str, Tensor], pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return trained tensors by name: of factored weights the pretrained value plus the change."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(DOWN):
            continue
        if not name.endswith(UP):
            found[name] = tensor
            continue
        weight = name.removesuffix(UP)
        start = pretrained[weight].detach()  # (m,n)
        up, down = tensor.to(start.device).float(), stored[weight + DOWN].to(start.device).float()
        found[weight] = start.float() + up @ down
    return found
