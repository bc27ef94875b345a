"""Memory of GPUs, and peak FLOPs as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
UTILISATION = 0.4  # share of the peak that training of this kind usually reaches; an assumption, not a measurement


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, and dense peak FLOPs a second in bfloat16 with float32 sums."""

    memory: int
    peak: float


GPUS = {
    "rtx4090-24gb": Gpu(24 * GIB, 165e12),
    "rtx5090-32gb": Gpu(32 * GIB, 210e12),
    "a100-40gb": Gpu(40 * GIB, 312e12),
    "a100-80gb": Gpu(80 * GIB, 312e12),
    "l40s-48gb": Gpu(48 * GIB, 362e12),
    "h100-80gb": Gpu(80 * GIB, 989e12),
    "h200-141gb": Gpu(141 * GIB, 989e12),
    "b200-180gb": Gpu(180 * GIB, 2250e12),
}
