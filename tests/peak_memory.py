"""Peak memory of a real training loop on the embedded micro model, in a process of its own, beside the plan's estimate.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/peak_memory.py stage2 12 stage2-checkpointed 12 stage1 8

prints {"measured": bytes, "estimated": bytes} for each pair of a stage and its batch size. The threshold makes freed memory
go back to the system, so that the resident set says what is in use. Linux only: the peak is reset by /proc/self/clear_refs.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from davae import DetailVAE, LatentLayout, expand_transformer
from davae.models.calls import CALLS
from davae.models.pipeline import read_shapes
from davae.recipes import load_recipe
from davae.recipes.sections import Stage1, Stage2
from davae.train.loop import Trainer
from davae.train.memory import stage1_memory, stage2_memory
from davae.train.objectives import FLOW
from davae.train.setup import make_accelerator
from davae.train.stage1 import Stage1Task
from davae.train.stage2 import Stage2Task
from davae.train.state import RunFolder
from davae.zoo import resolve

RECIPE: Any = load_recipe("micro")
BASE = resolve("micro")
CPU = torch.device("cpu")


class Rows:
    """As many equal items as asked for."""

    groups = None
    skipped: ClassVar[dict[str, str]] = {}

    def __init__(self, count: int, item: dict[str, Any]):
        self.count, self.item = count, item

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self.item


class Prompts:
    """Embeddings of the usual length for whatever is asked."""

    null = ""

    def draw(self, generator: torch.Generator) -> None:
        """Nothing is random."""

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: list[str]) -> Tensor:
        config = read_shapes(BASE).transformer_config
        call = CALLS["SD3Transformer2DModel"]
        parts = tuple(torch.zeros(len(x_t), *part.shape[1:]) for part in call.blank(config))
        return call.predict(model, config, x_t, t, parts)


def stage2(settings: Stage2) -> Stage2Task:
    base = SD3Transformer2DModel.from_pretrained(BASE, subfolder="transformer", torch_dtype=torch.float32)
    layout = LatentLayout(8, RECIPE.detail_channels)
    rows = Rows(64, {"latents": torch.zeros(layout.channels, 16, 16), "conditions": ""})
    normalise = torch.zeros(1, layout.channels, 1, 1), torch.ones(1, layout.channels, 1, 1)
    wide = expand_transformer(base, RECIPE.detail_channels)
    task = Stage2Task(settings, layout, wide, rows, normalise, Prompts(), FLOW, CPU)  # type: ignore[arg-type]
    task.collate = lambda items: {
        "latents": torch.stack([item["latents"] for item in items]),
        "conditions": [item["conditions"] for item in items],
    }
    return task


def stage1(settings: Stage1) -> Stage1Task:
    base = AutoencoderKL.from_pretrained(BASE, subfolder="vae", torch_dtype=torch.float32)
    rows = Rows(
        64, {"image": torch.zeros(3, RECIPE.resolution, RECIPE.resolution), "caption": "", "index": 0, "label": None}
    )
    return Stage1Task(settings, DetailVAE.from_base(base, RECIPE.detail_channels), rows, CPU)  # type: ignore[arg-type]


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def train(build: Any, settings: Any, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings.model_copy(update={"max_steps": steps})
        Trainer(build(settings), RECIPE.run, RunFolder(Path(folder), RECIPE), make_accelerator(RECIPE.run)).fit()


def compare(name: str, batch: int) -> dict[str, int]:
    changes = {"gradient_checkpointing": name.endswith("-checkpointed"), "accumulation": 1}
    shapes = read_shapes(BASE)
    if name.startswith("stage1"):
        build, settings = stage1, RECIPE.stage1.model_copy(update={**changes, "gan_start": 1})
    else:
        build, settings = stage2, RECIPE.stage2.model_copy(update=changes)
    train(build, settings.model_copy(update={"batch_size": 1}), 1)  # libraries, threads, code: not the step's
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    settings = settings.model_copy(update={"batch_size": batch})
    train(build, settings, 2)
    measured = resident("VmHWM") - before
    if name.startswith("stage1"):
        step = stage1_memory(shapes, RECIPE.detail_channels, RECIPE.scale, RECIPE.resolution, settings, mixed=False)
    else:
        step = stage2_memory(shapes, LatentLayout(8, RECIPE.detail_channels), 16, settings, mixed=False)
    return {"measured": measured, "estimated": step.peak}


def main() -> None:
    for name, batch in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        sys.stdout.write(json.dumps(compare(name, int(batch))) + "\n")


if __name__ == "__main__":
    main()
