"""PatchGAN: scores overlapping patches instead of whole pictures."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions with group norm, so that scores do not depend on the batch.

    Args:
        channels: width after the first layer; doubles per layer up to 8x.
        layers: strided layers after the first one; 3 sees 70x70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3):
        super().__init__()
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 1 if number == layers else 2
            blocks += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(_groups(after), after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) -> patch scores (B,1,h,w)."""
        return self.layers(images)


def _groups(channels: int) -> int:
    """Return the largest divisor of the channels that leaves four a group, at most 32."""
    return max(n for n in range(1, min(32, max(1, channels // 4)) + 1) if channels % n == 0)
