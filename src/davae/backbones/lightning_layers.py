"""Layers of LightningDiT: positions, embedders, attention, feed-forward, and the head.

Module names are those of the official checkpoints.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256  # width of the sinusoidal timestep embedding


def grid_positions(grid: int, pretrained_grid: int) -> Tensor:
    """Return the coordinates (grid,) of a grid's rows, in units of the pretrained grid.

    A finer grid spans the same range.
    """
    return torch.arange(grid, dtype=torch.float64) * pretrained_grid / grid


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """Return the fixed 2D position embedding (1,grid*grid,width) of a grid, column half first."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = positions[:, None] * frequencies  # (grid,width/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid,width/2)
    grid = len(positions)
    columns = line[None].expand(grid, -1, -1)  # (row,column,width/2)
    rows = line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def rotary_angles(positions: Tensor, head_width: int) -> Tensor:
    """Return rotary angles (grid*grid,head), those of rows in the first half of a head."""
    quarter = head_width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    line = (positions[:, None] * frequencies).repeat_interleave(2, dim=1)  # (grid,head/2)
    grid = len(positions)
    rows = line[:, None].expand(-1, grid, -1)
    columns = line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, head_width)


class RotaryEmbedding(nn.Module):
    """Rotation of neighbouring pairs of each head by angles of the token's place in the grid."""

    def __init__(self, positions: Tensor, head_width: int):
        super().__init__()
        angles = rotary_angles(positions, head_width)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        """(B,H,L,d) -> (B,H,L,d)."""
        cos, sin = cast(Tensor, self.freqs_cos), cast(Tensor, self.freqs_sin)
        if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
            # a pair times exp(i angle): one pass instead of five; half precision and the compiler know no complex numbers
            turn = torch.complex(cos[:, ::2].to(x), sin[:, ::2].to(x))  # (L,d/2)
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * cos.to(x) + turned * sin.to(x)


class PatchEmbed(nn.Module):
    """P: (B,C,h,w) -> (B,L,width), tokens in row order."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B,width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)  # (B,128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))


class LabelEmbedder(nn.Module):
    """Embedding (B,width) of class numbers (B,), with the null class of guidance last."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)


class Attention(nn.Module):
    """Self-attention with rotary positions and optional normalisation of queries and keys."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, rms_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        head_width = width // num_heads
        norm: Any = (lambda: nn.RMSNorm(head_width, eps=1e-6)) if rms_norm else (lambda: nn.LayerNorm(head_width))
        self.q_norm = norm() if qk_norm else nn.Identity()
        self.k_norm = norm() if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, rotary: nn.Module | None) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B,H,L,d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        mixed = mix_values(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B,L,width)


def mix_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention of (B,H,L,d), in float32 as CPU autocast has a 7x slower backward pass."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), w1 and w2 in one matrix."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1 x)), the tanh form: the feed-forward of DiT and SiT."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


def make_norm(width: int, rms_norm: bool) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if rms_norm else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulate(tokens: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Adaptive layer norm: (B,L,w) by shift and scale (B,w)."""
    gain = 1 + scale[:, None]
    return tokens * gain if shift is None else torch.addcmul(shift[:, None], tokens, gain)


class LightningDiTBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by time and class (adaLN-zero)."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.norm1 = make_norm(width, config.use_rmsnorm)
        self.attn = Attention(width, config.num_heads, config.use_qknorm, config.use_rmsnorm)
        self.norm2 = make_norm(width, config.use_rmsnorm)
        hidden = int(width * config.mlp_ratio)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if config.use_swiglu else GeluMLP(width, hidden)
        self.without_shift = config.wo_shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if config.wo_shift else 6) * width))

    def forward(
        self, tokens: Tensor, condition: Tensor, rotary: nn.Module | None, added: Tensor | None = None
    ) -> Tensor:
        """tokens (B,L,w), condition (B,w), more modulation (B,4w or 6w) to add -> (B,L,w)."""
        parts = self.adaLN_modulation(condition)
        if added is not None:
            parts = parts + added
        shift1 = shift2 = None
        if self.without_shift:
            scale1, gate1, scale2, gate2 = parts.chunk(4, dim=1)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=1)
        mixed = self.attn(modulate(self.norm1(tokens), shift1, scale1), rotary)
        tokens = torch.addcmul(tokens, gate1[:, None], mixed)
        return torch.addcmul(tokens, gate2[:, None], self.mlp(modulate(self.norm2(tokens), shift2, scale2)))


class FinalLayer(nn.Module):
    """O: (B,L,w) -> (B,L,p*p*c), channels innermost."""

    def __init__(self, config: Any, channels: int):
        super().__init__()
        width = config.hidden_size
        self.norm_final = make_norm(width, config.use_rmsnorm)
        self.linear = nn.Linear(width, config.patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))
