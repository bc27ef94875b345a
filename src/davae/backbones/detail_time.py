"""A time of the detail's own in a transformer (GRACE, arXiv 2610.10524, Eq. 13)."""

from __future__ import annotations

from torch import Tensor, nn

OFFSET = "_davae_detail_offset"  # config key of the offset at which a model with two times is sampled


class DetailTime(nn.Module):
    """Modulation of every block by the detail's time, zero at first: W_res of Eq. 13.

    m = W(phi(t_base) + y) + W_res phi(t_detail). phi is the pretrained embedding of time. Both projections begin with a SiLU,
    as W does. One W_res serves all blocks, as one W serves those of Wan2.1, GRACE's model; LightningDiT has a W for each
    block, and a second one for each would add a third to the model's weights.

    Args:
        width: of the tokens.
        parts: scales, shifts and gates of a block, 4 or 6.
    """

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Set all weights to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, embedded: Tensor) -> Tensor:
        """Embedding (B,w) of the detail's time -> what it adds to a block's modulation (B,parts*w)."""
        return self.modulation(embedded)


def base_and_detail_time(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times of base and detail, (B,) each, which one time (B,) is for both.

    Args:
        timestep: (B,), or (B,2) with the base's time first.
    """
    return (timestep, timestep) if timestep.ndim == 1 else (timestep[:, 0], timestep[:, 1])
