"""Stage 1 of a recipe in float64, by any number of processes: `python in_float64.py RECIPE OUT` writes OUT/values.json.

Losses are computed in float32 whatever the weights are; here `Tensor.float` keeps float64, so that what differs between two
runs is a fault and no rounding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from davae.recipes import load_recipe
from davae.runs.upgrade import Upgrade
from davae.train.distributed import is_main, mean_over_ranks, ranks
from davae.train.loop import Trainer
from davae.train.random import SampleRandom


def main(recipe: Any, out: Path) -> None:
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    run = Upgrade(recipe, out, lambda progress: None)
    task, values = run.stage1_task(), []
    task.vae.double()
    assert task.trainer.perceptual is not None
    task.trainer.perceptual.double()
    loss = task.loss

    def noted(player: str, batch: Any, step: int, draws: SampleRandom) -> tuple[torch.Tensor, dict[str, Any]]:
        total, logged = loss(player, {**batch, "images": batch["images"].double()}, step, draws)
        numbers = torch.stack([torch.as_tensor(value).double() for value in logged.values()])
        values.append(dict(zip(logged, mean_over_ranks(numbers).tolist(), strict=True)))
        return total, logged

    task.loss = noted
    Trainer(task, recipe.run, run.folder, run.accelerator).fit()
    if is_main():
        (out / "values.json").write_text(json.dumps({"processes": ranks(), "values": values}))


if __name__ == "__main__":
    main(load_recipe(sys.argv[1]), Path(sys.argv[2]))
