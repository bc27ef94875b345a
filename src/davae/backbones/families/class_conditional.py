"""Models that are told a class: DiT, and LightningDiT, which also runs the weights of SiT and DiT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from davae.backbones.call import ClassNumbers, Parts


class DiTCall(ClassNumbers):
    """Epsilon and a variance."""

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return model(x_t, timestep=t, class_labels=parts[0], return_dict=False)[0][:, : x_t.shape[1]]


class LightningDiTCall(ClassNumbers):
    """Velocity, its own time running from noise to data; or epsilon where the weights are DiT's."""

    def predict(self, model: nn.Module, config: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        if config["prediction_type"] == "epsilon":
            return model(x_t, t, parts[0], return_dict=False)[0][:, : x_t.shape[1]]
        return -model(x_t, 1 - t, parts[0], return_dict=False)[0]
