"""Stage 2 with the base ahead of the detail, at two noise levels (GRACE)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from davae.latent import LatentLayout
from davae.losses.base_ahead import base_ahead_levels
from davae.losses.flow_matching import FlowMatching
from davae.pretrained.placement import send
from davae.tasks.noising import NoisedBatch, Objective, error_weight
from davae.train.random import SampleRandom


@dataclass(frozen=True)
class TwoLevels:
    """Noise levels of base and detail in a training by flow matching.

    Attributes:
        layout: which channels are base.
        objective: flow matching, with the recipe's timesteps.
        offsets: least and greatest delta of a step.
        offset: delta of samples.
    """

    layout: LatentLayout
    objective: FlowMatching
    offsets: tuple[float, float]
    offset: float

    def at(self, share: Tensor, chance: Tensor) -> Tensor:
        """Return the levels of base and detail, (B,2) with 1 noise, from a training step's draws.

        As in GRACE (Tab. B.1), each sample draws delta uniformly. GRACE draws the clock u uniformly over [0, 1 + delta]. Here
        u / (1 + delta) has the recipe's logit-normal density (`stage2.timestep_*`), so that a training with an offset and one
        without it differ in the offset alone. The shift is a fixed one, which GRACE draws too.

        Args:
            share: u / (1 + delta), (B,).
            chance: uniform in [0,1), (B,), for delta.
        """
        low, high = self.offsets
        delta = low + (high - low) * chance
        return base_ahead_levels((1 + delta) * share, delta, self.objective.shift)

    def noise(self, latents: Tensor, draws: SampleRandom) -> NoisedBatch:
        """Noise each group of latents (B,C+D,h,w) at its level, Eq. 12 of GRACE.

        x_t = [(1 - s) z + s n, (1 - s_d) z_d + s_d n_d]. The path of each group is straight in its own level, so the target
        is n - z and n_d - z_d, the same as at one level.

        Returns:
            The batch; its `t` is (B,2), and a base at level 0 is clean.
        """
        share = replace(self.objective, shift=1.0).draw(draws.samples)
        noise = send(draws.normal(*latents.shape[1:]), latents.device).to(latents.dtype)
        t = send(self.at(share, draws.uniform()), latents.device)  # drawn last: with no offset all is as at one level
        groups = zip(self.layout.split(latents), self.layout.split(noise), t.unbind(1), strict=True)
        x_t = self.layout.join(*(self.objective.noised(data, n, level) for data, n, level in groups))
        return NoisedBatch(x_t, t, self.objective.target(latents, noise, t), t[:, 0] == 0)

    def with_clean_base(self, t: Tensor, chosen: Tensor) -> Tensor:
        """Return the levels (B,2) with that of the chosen samples' base at 0, chosen (B,) booleans."""
        base, detail = t.unbind(1)
        return torch.stack([base.masked_fill(chosen, 0.0), detail], dim=1)

    def times(self, steps: int) -> Tensor:
        """Return the levels at which a sampler stops, (steps+1,2), from noise to data.

        Its clock u runs evenly from 1 + delta to 0, as in GRACE (App. B.2).
        """
        return base_ahead_levels(torch.linspace(1 + self.offset, 0, steps + 1), self.offset, self.objective.shift)


def error_weight_by_group(
    objective: Objective, t: Tensor, layout: LatentLayout, *, min_snr_gamma: float | None, x0_ratio_max: float | None
) -> Tensor | None:
    """Return `error_weight` of each group at its own level, (B,C+D,1,1), or None.

    Args:
        objective: flow matching.
        t: levels of base and detail, (B,2).
        layout: which channels are base.
        min_snr_gamma, x0_ratio_max: as `error_weight` takes them.
    """
    base, detail = (
        error_weight(objective, level, min_snr_gamma=min_snr_gamma, x0_ratio_max=x0_ratio_max)
        for level in t.unbind(1)
    )
    return None if base is None or detail is None else layout.by_group(base, detail)
