"""Order of latent channels: base first, detail second (Eq. 1-2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LatentLayout:
    """Layout of a structured latent z_hr = [z, z_d] on its channel axis (Eq. 1-2).

    Args:
        base_channels: C, channels of the pretrained base latent z.
        detail_channels: D, channels of the detail latent z_d; a multiple of C, so that Eq. 4 groups them evenly.
        scale: s, ratio of the high resolution to the base resolution.

    Raises:
        ValueError: when a number is not positive or D is not a multiple of C.
    """

    base_channels: int
    detail_channels: int
    scale: int = 2

    def __post_init__(self) -> None:
        if self.base_channels < 1 or self.detail_channels < 1:
            raise ValueError(
                f"base_channels and detail_channels must be positive, found {self.base_channels} and "
                f"{self.detail_channels}"
            )
        if self.detail_channels % self.base_channels:
            raise ValueError(
                f"detail_channels must be a multiple of the base's {self.base_channels} channels, found "
                f"{self.detail_channels}; use e.g. {self.base_channels * max(1, self.detail_channels // self.base_channels)}"
            )
        if self.scale < 2:
            raise ValueError(f"scale must be at least 2, found {self.scale}")

    @property
    def channels(self) -> int:
        """C + D."""
        return self.base_channels + self.detail_channels

    @property
    def group_size(self) -> int:
        """r = D / C: detail channels that align with one base channel (Eq. 4)."""
        return self.detail_channels // self.base_channels

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B,C+D,h,w) -> z (B,C,h,w), z_d (B,D,h,w)."""
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels, this layout has "
                f"{self.base_channels} base + {self.detail_channels} detail = {self.channels}"
            )
        z, z_d = latents.split([self.base_channels, self.detail_channels], dim=1)
        return z, z_d

    def join(self, z: Tensor, z_d: Tensor) -> Tensor:
        """z (B,C,h,w), z_d (B,D,h,w) -> (B,C+D,h,w)."""
        if z.shape[1] != self.base_channels or z_d.shape[1] != self.detail_channels:
            raise ValueError(
                f"expected {self.base_channels} base and {self.detail_channels} detail channels, found "
                f"{z.shape[1]} and {z_d.shape[1]}"
            )
        return torch.cat([z, z_d], dim=1)

    def by_group(self, base: Tensor, detail: Tensor) -> Tensor:
        """Return a value of each group as one of each channel, (B,1,1,1) each -> (B,C+D,1,1)."""
        return self.join(base.expand(-1, self.base_channels, -1, -1), detail.expand(-1, self.detail_channels, -1, -1))


def check_statistics(name: str, values: Sequence[float]) -> None:
    """Check the numbers that latents are normalised by.

    Args:
        name: of the setting; one that ends in `std` must be positive.

    Raises:
        ValueError: a number that is not finite, or a standard deviation that is not positive.
    """
    for channel, value in enumerate(values):
        if not math.isfinite(value) or (name.endswith("std") and value <= 0):
            raise ValueError(f"{name}: {value} at channel {channel}; it must be finite, a std positive")


@dataclass(frozen=True)
class LatentStatistics:
    """Mean, standard deviation and prediction that turn raw latents into those of a transformer.

    Attributes:
        mean, std: (1,c,1,1), or (1,c,k,k) of the positions of a k x k cell.
        kernel: (D,C,k,k) of `predict_detail`; the detail is then what z does not predict.
    """

    mean: Tensor
    std: Tensor
    kernel: Tensor | None = None

    def to(self, *place: torch.device | torch.dtype | Tensor) -> LatentStatistics:
        """Return the statistics on another device or in another precision, as `Tensor.to`."""
        mean, std = (values.to(*place) for values in (self.mean, self.std))  # type: ignore[arg-type]
        return LatentStatistics(mean, std, None if self.kernel is None else self.kernel.to(*place))  # type: ignore[arg-type]

    def normalise(self, latents: Tensor) -> Tensor:
        """Return what the transformer takes for raw latents (B,c,h,w)."""
        x = (latents - over_grid(self.mean, latents)) / over_grid(self.std, latents)
        if self.kernel is None:
            return x
        z, z_d = x[:, : self.kernel.shape[1]], x[:, self.kernel.shape[1] :]
        scale = over_grid(self.std, x)[:, self.kernel.shape[1] :]
        return torch.cat([z, z_d - predict_detail(z, self.kernel) / scale], dim=1)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return the raw latents of what the transformer takes, (B,c,h,w)."""
        raw = latents * over_grid(self.std, latents) + over_grid(self.mean, latents)
        if self.kernel is None:
            return raw
        base = self.kernel.shape[1]
        return torch.cat([raw[:, :base], raw[:, base:] + predict_detail(latents[:, :base], self.kernel)], dim=1)


def predict_detail(z: Tensor, kernel: Tensor) -> Tensor:
    """Return K * z, what the neighbourhood in z linearly predicts of raw z_d.

    It is the predict step of a lifting scheme (Sweldens, 1996): z stays as it is, and z_d - K * z takes the place of z_d. The
    step is undone exactly by adding K * z again, whatever K is.

    Args:
        z: normalised (B,C,h,w).
        kernel: K (D,C,k,k) with an odd k, in the units of the raw detail. Beyond the border z is repeated.

    Returns:
        (B,D,h,w), in the wider of both precisions.
    """
    margin, wide = kernel.shape[-1] // 2, torch.promote_types(z.dtype, kernel.dtype)
    return F.conv2d(F.pad(z.to(wide), [margin] * 4, mode="replicate"), kernel.to(wide))


def over_grid(statistics: Tensor, latents: Tensor) -> Tensor:
    """Repeat statistics (1,c,k,k) of a k x k cell over the grid of latents (B,c,h,w).

    Args:
        statistics: (1,c,k,k).
        latents: (B,c,h,w).
    """
    side = statistics.shape[-1]
    if side == 1:
        return statistics
    height, width = latents.shape[-2:]
    return statistics.repeat(1, 1, -(-height // side), -(-width // side))[..., :height, :width]
