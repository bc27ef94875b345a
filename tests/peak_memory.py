"""Peak memory of a real training loop, in a process of its own, beside the plan's estimate.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/peak_memory.py stage2 12 stage2-checkpointed 12 stage1 8 stage2@sd35-medium 2

    MALLOC_MMAP_THRESHOLD_=65536 python tests/peak_memory.py cache 16 report 16 sampling 8 cache@sd35-medium 1

prints {"measured": bytes, "estimated": bytes} for each stage and its batch size. `@` names a preset: its transformer
is then of the true width with one block, its autoencoder whole, all of random weights. The threshold makes freed memory go
back to the system, so that the resident set says what is in use. Linux only: the peak is reset by /proc/self/clear_refs.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from davae import DetailVAE, LatentLayout, expand_transformer
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import family_by_class
from davae.cost.flops import predict_once
from davae.cost.memory import TrainingStep, stage1_memory, stage2_memory
from davae.dataset.encoding import Encoder
from davae.lab.bench.tokens import shallow
from davae.latent import LatentStatistics
from davae.losses.flow_matching import FlowMatching
from davae.plan.phase_sizes import ImageFacts, PhaseSizes, TextFacts
from davae.plan.phases import drawing_bytes, encoding_bytes
from davae.pretrained.shapes import BaseShapes, read_shapes
from davae.recipes import load_recipe
from davae.recipes.sections import Stage1, Stage2
from davae.tasks.stage1 import Stage1Task
from davae.tasks.stage2 import Stage2Task
from davae.train.accelerator import make_accelerator
from davae.train.loop import Trainer
from davae.train.run_folder import RunFolder
from davae.train.shares import Share
from davae.vae.frames import decode_latents
from davae.zoo import resolve

RECIPE: Any = load_recipe("micro")
BASE = resolve("micro")
CPU = torch.device("cpu")
Work = Callable[[int], object]


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


@dataclass(frozen=True)
class Model:
    """What is trained: the embedded model, or one block of a preset's."""

    shapes: BaseShapes
    resolution: int  # of the pictures
    detail_channels: int

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout(self.shapes.channels, self.detail_channels)

    @property
    def side(self) -> int:
        return self.resolution // self.shapes.vae_factor // RECIPE.scale


def model_of(preset: str) -> Model:
    if not preset:
        return Model(read_shapes(BASE), RECIPE.resolution, RECIPE.detail_channels)
    shapes = read_shapes(preset)
    one = shallow(shapes.transformer_config, 1)
    return Model(replace(shapes, transformer_config=one), 256, shapes.channels)


class Prompts:
    """Embeddings of the usual length for whatever is asked."""

    null = ""

    def __init__(self, model: Model):
        self.model = model

    def draw(self, generator: torch.Generator) -> None:
        """Nothing is random."""

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: list[str]) -> Tensor:
        config = self.model.shapes.transformer_config
        call = family_by_class(self.model.shapes.transformer_class).call
        parts = tuple(torch.zeros(len(x_t), *part.shape[1:]) for part in call.blank(config))
        return call.predict(model, config, x_t, t, parts)


def part(class_name: str, config: dict[str, Any]) -> Any:
    return model_class(class_name).from_config({k: v for k, v in config.items() if not k.startswith("_")})


def stage2(settings: Stage2, model: Model) -> Stage2Task:
    base = part(model.shapes.transformer_class, model.shapes.transformer_config)
    layout, side = model.layout, model.side
    rows = Rows(64, {"latents": torch.zeros(layout.channels, side, side), "conditions": ""})
    ones = torch.ones(1, layout.channels, 1, 1)
    wide = expand_transformer(base, model.detail_channels)
    task = Stage2Task(
        settings, layout, wide, rows, LatentStatistics(0 * ones, ones), Prompts(model), FlowMatching(), CPU
    )  # type: ignore[arg-type]
    task.collate = lambda items: {
        "latents": torch.stack([item["latents"] for item in items]),
        "conditions": [item["conditions"] for item in items],
    }
    return task


def stage1(settings: Stage1, model: Model) -> Stage1Task:
    base = part(model.shapes.vae_class, model.shapes.vae_config)
    image = torch.zeros(3, model.resolution, model.resolution)
    rows = Rows(64, {"image": image, "caption": "", "index": 0, "label": None})
    return Stage1Task(settings, DetailVAE.from_base(base, model.detail_channels), rows, CPU)  # type: ignore[arg-type]


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def train(build: Any, settings: Any, model: Model, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings.model_copy(update={"max_steps": steps})
        task = build(settings, model)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # random tables of positions are made in float64
        Trainer(task, RECIPE.run, RunFolder(Path(folder), RECIPE), make_accelerator(RECIPE.run)).fit()


def compare(name: str, batch: int) -> dict[str, int]:
    stage, _, preset = name.partition("@")
    changes = {"gradient_checkpointing": stage.endswith("-checkpointed"), "accumulation": 1}
    model = model_of(preset)
    if stage.startswith("stage1"):
        build, settings = stage1, RECIPE.stage1.model_copy(update={**changes, "gan_start": 1})
    else:
        build, settings = stage2, RECIPE.stage2.model_copy(update=changes)
    train(build, settings.model_copy(update={"batch_size": 1}), model, 1)  # libraries, threads, code: not the step's
    gc.collect()
    before = resident("VmRSS")
    settings = settings.model_copy(update={"batch_size": batch})
    train(build, settings, model, 2)
    measured = resident("VmHWM") - before
    shapes, scale = model.shapes, RECIPE.scale
    if stage.startswith("stage1"):
        step = stage1_memory(shapes, model.detail_channels, scale, model.resolution, settings, mixed=False)
    else:
        step = stage2_memory(shapes, model.layout, model.side, settings, mixed=False)
    return {"measured": measured, "estimated": step.peak}


# -- phases without training: images encoded, drawn, reconstructed ----------------------------------------------------


def facts(model: Model) -> PhaseSizes:
    """What the plan computes those phases from, in float32; trainings and text aside."""
    nothing = TrainingStep(0, 0, 0, 0, 0, 0.0)
    base = RECIPE.base.model_copy(update={"resolution": model.resolution // RECIPE.scale})
    return PhaseSizes(
        recipe=RECIPE.model_copy(update={"base": base}),
        shapes=model.shapes,
        layout=model.layout,
        step1=nothing,
        step2=nothing,
        text=TextFacts(),
        images=ImageFacts(1, True),
        **dict.fromkeys(("transformer", "trained", "base_vae", "detail_vae"), 0),
        **dict.fromkeys(("encode_flops", "decode_flops", "upgraded_flops", "native_flops"), 0.0),
        share1=Share(1, 1),
        share2=Share(1, 1),
    )


def parts(model: Model) -> tuple[Any, Any, DetailVAE]:
    """Transformer, autoencoder and DetailVAE with random weights."""
    shapes = model.shapes
    vae = part(shapes.vae_class, shapes.vae_config).eval()
    transformer = part(shapes.transformer_class, shapes.transformer_config).eval()
    return transformer, vae, DetailVAE.from_base(vae, model.detail_channels).eval()


def draw(model: Model, transformer: Any, vae: Any, channels: int, factor: int) -> Work:
    """A guided step of the transformer for some images, with prompts of the usual length, then decoding."""
    side = model.resolution // factor

    @torch.no_grad()
    def work(images: int) -> None:
        predict_once(transformer, transformer, torch.zeros(2 * images, channels, side, side))
        decode_latents(vae, torch.zeros(images, channels, side, side))

    return work


def phase(name: str, model: Model) -> tuple[list[Work], int]:
    """What a phase does to some images, and the bytes that the plan gives one of them."""
    transformer, vae, detail = parts(model)
    sizes, factor = facts(model), model.shapes.vae_factor
    encoder = Encoder(detail, torch.float32, 64)
    encode: Work = lambda images: encoder(torch.zeros(images, 3, model.resolution, model.resolution))  # noqa: E731
    if name == "cache":
        return [encode], encoding_bytes(sizes)
    wide = expand_transformer(transformer, model.detail_channels).eval()
    upgraded = draw(model, wide, detail, model.layout.channels, factor * RECIPE.scale)
    if name == "sampling":
        return [upgraded], drawing_bytes(sizes, upgraded=True).one
    native = draw(model, transformer, vae, model.shapes.channels, factor)
    planned = [encoding_bytes(sizes), *(drawing_bytes(sizes, upgraded=kind).one for kind in (False, True))]
    return [encode, native, upgraded], max(planned)


def compare_phase(name: str, images: int, model: Model) -> dict[str, int]:
    works, one = phase(name, model)
    measured = 0
    for work in works:
        work(1)  # libraries, threads, code: not the phase's
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        work(images)
        measured = max(measured, resident("VmHWM") - before)
    return {"measured": measured, "estimated": images * one}


def main() -> None:
    for name, batch in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        kind, _, preset = name.partition("@")
        found = (
            compare_phase(kind, int(batch), model_of(preset))
            if kind in ("cache", "report", "sampling")
            else compare(name, int(batch))
        )
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
