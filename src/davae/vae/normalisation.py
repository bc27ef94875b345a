"""The part of a DetailVAE that normalises its latents for the transformer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from davae.latent import LatentLayout, LatentStatistics, check_statistics

KERNEL_SIZES = (1, 3, 5, 7)


class Normalisation:
    """Methods of a DetailVAE on the statistics of its latents."""

    layout: LatentLayout
    config: Any
    register_buffer: Any
    register_to_config: Any
    mean: Tensor
    std: Tensor
    detail_kernel: Tensor | None

    def _register_statistics(self, side: int) -> None:
        """Make the buffers of the statistics, (1,C+D,side,side), and of the kernel.

        The statistics are saved in the config alone, the kernel with the weights.
        """
        cell = (1, self.layout.channels, side, side)
        self.register_buffer("mean", torch.zeros(cell), persistent=False)
        self.register_buffer("std", torch.ones(cell), persistent=False)
        size = self.config["detail_kernel_size"]
        if size not in (None, *KERNEL_SIZES):
            raise ValueError(f"detail_kernel_size must be one of {KERNEL_SIZES}, or None; found {size}")
        kernel = None
        if size is not None:
            kernel = torch.zeros(self.layout.detail_channels, self.layout.base_channels, size, size)
        self.register_buffer("detail_kernel", kernel)
        self._fill_statistics()

    def _fill_statistics(self) -> None:
        """Put the config's per-channel statistics into the buffers, at their precision."""
        for buffer, group, default in ((self.mean, "mean", 0.0), (self.std, "std", 1.0)):
            for part, name in zip(self.layout.split(cast(Tensor, buffer)), ("base", "detail"), strict=True):
                values = self.config[f"{name}_{group}"]
                if values is None:
                    values = [default] * part.shape[1]
                if len(values) not in (part.shape[1], part[0].numel()):
                    raise ValueError(f"{name}_{group} has {len(values)} values for {part.shape[1]} channels")
                check_statistics(f"{name}_{group}", values)
                side = math.isqrt(len(values) // part.shape[1])
                part.copy_(torch.tensor(values, dtype=torch.float64).view(1, -1, side, side))

    def set_detail_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the measured mean and std (D,) of raw z_d in the config, and use them from now on."""
        self.register_to_config(
            detail_mean=[float(value) for value in mean],
            detail_std=[max(float(value), 1e-4) for value in std],  # a dead channel must not divide by zero
        )
        self._fill_statistics()

    def set_detail_kernel(self, kernel: Tensor | None) -> None:
        """Make z_d what z does not predict by a kernel (D,C,k,k), or the whole detail again by None.

        The statistics of the detail are then to be set anew. See `davae.latent.predict_detail`.
        """
        self.detail_kernel = None if kernel is None else kernel.to(self.mean)
        self.register_to_config(detail_kernel_size=None if kernel is None else kernel.shape[-1])

    @property
    def statistics(self) -> LatentStatistics:
        """Mean, std and kernel of raw [z, z_d]."""
        return LatentStatistics(cast(Tensor, self.mean), cast(Tensor, self.std), self.detail_kernel)

    def normalise(self, latents: Tensor) -> Tensor:
        """Return what the transformer takes for raw [z, z_d]."""
        return self.statistics.normalise(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return raw [z, z_d] of what the transformer takes."""
        return self.statistics.denormalise(latents)
