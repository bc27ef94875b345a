"""LightningDiT, the class-conditional ImageNet model of the paper, as a diffusers model.

Module names are those of the official checkpoints, so their weights load as they are. The same class with its
extras switched off is the architecture of DiT and SiT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.backbones.detail_head import DetailHead
from davae.backbones.detail_time import DetailTime, base_and_detail_time
from davae.backbones.lightning_layers import (
    FinalLayer,
    LabelEmbedder,
    LightningDiTBlock,
    PatchEmbed,
    RotaryEmbedding,
    TimestepEmbedder,
    grid_positions,
    sinusoidal_positions,
)
from davae.latent import LatentLayout

Prediction = Literal["velocity", "epsilon"]


@dataclass(frozen=True)
class Tables:
    """Positions of one grid: its side, the embedding (1,L,w) that is added, and the rotary one."""

    input_size: int
    embedding: Tensor
    rotary: nn.Module | None

    def on(self, device: torch.device) -> Tables:
        """Return these tables on a device, or the object itself where it is there already."""
        if self.embedding.device == device:
            return self
        rotary = None if self.rotary is None else self.rotary.to(device)
        return Tables(self.input_size, self.embedding.to(device), rotary)


class LightningDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Class-conditional transformer on latents (B,C,g,g).

    The defaults are LightningDiT-XL/1 on VA-VAE at 256 pixels. Time runs from 0 (noise) to 1 (data) and the velocity
    is data - noise, the convention of the official weights.

    Args:
        input_size: g, side of the latent grid.
        patch_size: p, latent positions per token, each way.
        in_channels: C.
        num_classes: the null class of guidance is number `num_classes`.
        learn_sigma: the head predicts C more channels, a variance: dropped for velocity, returned for epsilon.
        use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift: the architecture's switches, under their official names.
        prediction_type: what the output means. `epsilon` is DiT's, whose timestep runs over 0..999.
        reversed_time: the weights were trained with t = 1 as noise (REPA): time and velocity are turned round.
        out_channels: C, or 2C where a variance is returned; worked out when not given.
        detail_channels: D, the last channels of an upgrade, where they have a time of their own; see `DetailTime`.
        head_options: of an upgrade's `DetailHead`: base_channels, and linear_skip, prediction, or both.

    Raises:
        ValueError: sizes that do not divide, or `head_options` of a model that predicts epsilon.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("LightningDiTBlock",)
    _repeated_blocks = ("LightningDiTBlock",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["detail_head"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        prediction_type: Prediction = "velocity",
        reversed_time: bool = False,
        out_channels: int | None = None,
        sample_size: int | None = None,
        detail_channels: int = 0,
        head_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if head_options is not None and prediction_type != "velocity":
            raise ValueError(f"a model that predicts {prediction_type} has no detail_head; it is for velocities")
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size // num_heads % 4 or hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} over {num_heads} heads gives no head width that is a multiple of 4"
            )
        config = cast(Any, self.config)
        returned = 2 if learn_sigma and prediction_type == "epsilon" else 1
        self.register_to_config(out_channels=out_channels or returned * in_channels, sample_size=input_size)
        self._tables: Tables | None = None  # of the grid that it is at
        self._kept_tables: Tables | None = None  # of the one before
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        grid = input_size // patch_size
        positions = grid_positions(grid, grid)
        self.pos_embed = nn.Parameter(sinusoidal_positions(positions, hidden_size), requires_grad=False)
        self.feat_rope = RotaryEmbedding(positions, hidden_size // num_heads) if use_rope else None
        self.blocks = nn.ModuleList([LightningDiTBlock(config) for _ in range(depth)])
        self.final_layer = FinalLayer(config, (2 if learn_sigma else 1) * in_channels)
        self.detail_time: DetailTime | None = None
        self.detail_head = None if head_options is None else DetailHead(in_channels, **head_options)
        self._initialise()
        if detail_channels:
            self.add_detail_time(detail_channels)

    def _initialise(self) -> None:
        """Initialise matrices by Xavier, gates and head to zero: blocks are identities, output 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        gates = [cast(LightningDiTBlock, block).adaLN_modulation[1] for block in self.blocks]
        for module in (*gates, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def add_detail_time(self, detail_channels: int) -> None:
        """Give the last channels a time of their own, whose modulation is zero at first.

        Raises:
            ValueError: a model of epsilon.
        """
        config = cast(Any, self.config)
        if config.prediction_type != "velocity":
            raise ValueError(f"this model predicts {config.prediction_type}; a velocity alone has a time of its own")
        parts = 4 if config.wo_shift else 6
        self.detail_time = DetailTime(config.hidden_size, parts).to(self.pos_embed.device, self.pos_embed.dtype)
        self.register_to_config(detail_channels=detail_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity (or epsilon) of noisy latents.

        Args:
            hidden_states: latents (B,C,g,g).
            timestep: (B,) in [0,1], 0 noise and 1 data; 0..999 for epsilon models. (B,2) gives base and detail each a time,
                where the model has `detail_channels`.
            class_labels: (B,) in 0..num_classes, `num_classes` meaning none.

        Returns:
            `.sample` (B,C,g,g), or (B,2C,g,g) for an epsilon model that learns its variance.

        Raises:
            ValueError: another grid or number of channels than the model's.
        """
        config = cast(Any, self.config)
        if self._tables is not None:  # offloaded weights reach their device with the first pass alone
            self._tables = self._tables.on(hidden_states.device)
        tables = self._tables or Tables(config.input_size, self.pos_embed, self.feat_rope)
        size = tables.input_size
        if hidden_states.shape[1:] != (config.in_channels, size, size):
            raise ValueError(
                f"latents are {tuple(hidden_states.shape[1:])}, this LightningDiT takes "
                f"({config.in_channels}, {size}, {size})"
            )
        own_time = 1 - timestep if config.reversed_time else timestep
        dtype = self.pos_embed.dtype
        tokens = self.x_embedder(hidden_states) + tables.embedding  # (B,L,w)
        label = self.y_embedder(class_labels)
        if self.detail_time is None:
            condition, later, added = self.t_embedder(own_time, dtype) + label, None, None  # (B,w)
        else:  # Eq. 13 of GRACE; each group's head has its own time (App. B.1)
            base, detail = (self.t_embedder(time, dtype) for time in base_and_detail_time(own_time))
            condition, later, added = base + label, detail + label, self.detail_time(detail)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, tables.rotary, added)  # type: ignore[operator]
            else:
                tokens = block(tokens, condition, tables.rotary, added)
        output = self._output(tokens, condition, size // config.patch_size)
        if later is not None:
            layout = LatentLayout(config.in_channels - config.detail_channels, config.detail_channels)
            lagging = self._output(tokens, later, size // config.patch_size)
            output = layout.join(layout.split(output)[0], layout.split(lagging)[1])
        if config.reversed_time:
            output = -output
        if self.detail_head is not None:
            output = self.detail_head(output, hidden_states, timestep)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _output(self, tokens: Tensor, condition: Tensor, grid: int) -> Tensor:
        """(B,L,w) through the head -> (B,c,g,g), without the variance of a velocity model."""
        config = cast(Any, self.config)
        output = self._unpatchify(self.final_layer(tokens, condition), grid)
        if config.learn_sigma and config.prediction_type == "velocity":
            output, _ = output.chunk(2, dim=1)
        return output

    def _unpatchify(self, tokens: Tensor, grid: int) -> Tensor:
        """(B,grid*grid,p*p*c) -> (B,c,g,g)."""
        p = cast(Any, self.config).patch_size
        x = tokens.unflatten(1, (grid, grid)).unflatten(3, (p, p, -1))  # (B,gh,gw,p,p,c)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @contextmanager
    def at_grid(self, input_size: int) -> Iterator[LightningDiT]:
        """Let the model take another latent grid in this context, with interpolated positions.

        Raises:
            ValueError: a size that does not divide into patches.
        """
        config = cast(Any, self.config)
        if input_size % config.patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {config.patch_size}")
        dtype, kept = self.pos_embed.dtype, self._kept_tables
        if kept is None or kept.input_size != input_size or kept.embedding.dtype != dtype or kept.embedding.is_meta:
            own = config.input_size // config.patch_size
            positions = grid_positions(input_size // config.patch_size, own)
            rotary = RotaryEmbedding(positions, config.hidden_size // config.num_heads)
            embedding = sinusoidal_positions(positions, config.hidden_size).to(dtype)
            kept = Tables(input_size, embedding, rotary if config.use_rope else None)
        self._tables = kept
        try:
            yield self
        finally:
            self._kept_tables, self._tables = self._tables, None


# A pipeline's model_index.json names a component's home; diffusers takes a name only if that module is imported, and
# `import davae` is what people write.
LightningDiT.__module__ = "davae"
