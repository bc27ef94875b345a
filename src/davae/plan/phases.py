"""What every phase of an upgrade takes: device memory, main memory, disk and time, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from davae.backbones.expand import expand_transformer
from davae.cost.flops import meta_autoencoder, meta_transformer
from davae.cost.memory import TrainingStep, decode_sampling_bytes, encode_bytes, transformer_sampling_bytes
from davae.plan.phase_remedies import checked
from davae.plan.phase_sizes import HOST_RUNTIME, Phase, Sizes
from davae.pretrained.memory_budget import TILE, largest_batch
from davae.recipes.hardware import UTILISATION
from davae.recipes.schema import Recipe
from davae.recipes.sections import Optim
from davae.train.shares import Share

DISK_RATE = 1e9  # bytes a second that a run folder's disk writes; an assumption
REPORT_BATCH = 16  # images that the report draws and decodes at a time, at most


def plan_phases(sizes: Sizes) -> list[Phase]:
    """Return the six phases in order, each checked against the hardware."""
    phases = [make(sizes) for make in (stage1, cache, stage2, export, report, sampling)]
    return [checked(phase, sizes, sum(p.disk for p in phases[:n])) for n, phase in enumerate(phases)]


_REHEARSED: dict[str, int] = {}  # what was asked -> bytes; a process plans the same sizes for several phases


def rehearsed(work: Callable[[], int], *asked: Any) -> int:
    """Return `work()`, or what it returned before in this process for a request whose parts print the same."""
    key = repr(asked)
    if key not in _REHEARSED:
        _REHEARSED[key] = work()
    return _REHEARSED[key]


def remember(value: int, *asked: Any) -> None:
    """Let `rehearsed` return a value for a request without rehearsing it."""
    _REHEARSED[repr(asked)] = value


def encoding(sizes: Sizes, tile: int | None = None) -> int:
    """Bytes of encoding one image with the detail VAE in the run's precision."""
    asked = sizes.shapes, sizes.layout, sizes.recipe.resolution, sizes.precision, tile
    return rehearsed(lambda: encode_bytes(sizes.meta_detail(), *asked[2:]), "encode", asked)


# -- training --------------------------------------------------------------------------------------------------------


def trained_phase(name: str, sizes: Sizes, settings: Optim, step: TrainingStep, share: Share, **counts: int) -> Phase:
    """One training.

    Args:
        counts: `loaded`: bytes that a process reads into main memory on their way to the device. `resident`: bytes on the
            device besides the step. `kept`: values of a checkpoint, of 4 bytes each. `average`: bytes of the EMA. `item`:
            bytes of an item of a batch. `extra_disk`: bytes of what the phase leaves besides checkpoints.
    """
    run, recipe = sizes.recipe.run, sizes.recipe
    workers = recipe.stage2_data.num_workers if recipe.stage2_data.num_workers is not None else 8
    checkpoint = 4 * counts["kept"]
    average = counts["average"] if run.ema_device == "cpu" else 0
    queue = 2 * max(1, workers) * share.images * counts["item"]
    first = HOST_RUNTIME + average + queue + max(counts["loaded"], checkpoint)
    other = HOST_RUNTIME + average + queue
    files = run.keep_checkpoints + 2  # one is written before another goes, and the best one stays
    if run.keep_every:
        files += settings.max_steps // run.keep_every
    return Phase(
        name,
        device=step.peak + counts["resident"] - (counts["average"] if average else 0),
        host=first,
        machine=first + (sizes.local - 1) * other,
        disk=files * checkpoint + counts["extra_disk"],
        seconds=step.flops * share.passes * settings.max_steps / (UTILISATION * sizes.gpu.peak),
    )


def stage1(sizes: Sizes) -> Phase:
    recipe, step = sizes.recipe, sizes.step1
    trained = (step.optimizer + step.gradients + step.ema) // 4
    return trained_phase(
        "stage1",
        sizes,
        recipe.stage1,
        step,
        sizes.share1,
        loaded=4 * (sizes.base_vae + sizes.detail_vae),
        resident=sizes.share1.images * sizes.image_bytes(recipe.stage1_pixels),
        kept=trained,
        average=step.ema,
        item=sizes.image_bytes(recipe.stage1_pixels),
        extra_disk=4 * sizes.detail_vae,
    )


def stage2(sizes: Sizes) -> Phase:
    recipe, step = sizes.recipe, sizes.step2
    resident, loaded = 0, sizes.base_bytes * sizes.transformer + 4 * sizes.trained
    if recipe.stage2.validate_every or recipe.run.sample_every:
        resident += 4 * sizes.detail_vae
    text = sizes.text
    if recipe.cache.text == "step":
        resident += sizes.text_device(sizes.share2.images) + 4 * sizes.base_vae
        loaded = max(loaded, sizes.base_bytes * text.parameters)  # read once the transformer is on the device
    item = sizes.latent_bytes + 2 * text.padded_values
    phase = trained_phase(
        "stage2",
        sizes,
        recipe.stage2,
        step,
        sizes.share2,
        loaded=loaded,
        resident=resident + sizes.share2.images * 4 * text.padded_values,
        kept=(step.optimizer + step.gradients + step.ema) // 4,
        average=step.ema,
        item=item,
        extra_disk=0,
    )
    if recipe.cache.text == "step":
        prompts = sizes.share2.images * sizes.share2.passes * recipe.stage2.max_steps
        phase = replace(phase, seconds=phase.seconds + sizes.seconds(text.flops * prompts, 1))
    return phase


# -- cache -----------------------------------------------------------------------------------------------------------


def cache(sizes: Sizes) -> Phase:
    """Images in the run's precision, as many at a time as fit, in tiles where one does not; then prompts."""
    recipe, text, dtype = sizes.recipe, sizes.text, sizes.precision
    weights = (4 + (dtype.itemsize if dtype.itemsize < 4 else 0)) * sizes.detail_vae
    one = encoding(sizes) + sizes.image_bytes(recipe.resolution)
    if weights + one > sizes.budget:
        one = encoding(sizes, TILE)
    batch = largest_batch(one, sizes.budget - weights, recipe.cache.batch_size)
    items = sizes.images.count * recipe.cache.variants
    device, flops, disk = weights + batch * one, sizes.encode_flops * items, items * sizes.latent_bytes
    loaded = 4 * sizes.detail_vae
    if text.parameters and recipe.cache.text == "stored" and recipe.cache.shards is None:
        prompts = 4 * sizes.detail_vae + sizes.text_device(recipe.cache.batch_size) + 4 * sizes.base_vae
        device, flops = max(device, prompts), flops + text.flops * sizes.images.count
        disk += sizes.text_disk
        loaded = max(loaded, sizes.base_bytes * text.parameters)
    queue = 2 * recipe.cache.batch_size * sizes.image_bytes(recipe.resolution)
    shard = 1024 * sizes.latent_bytes
    own = HOST_RUNTIME + queue + shard
    return Phase(
        "cache",
        device=device,
        host=own + loaded,
        machine=sizes.local * own + loaded,  # one process of a machine loads at a time
        disk=disk,
        seconds=sizes.seconds(flops),
        batch=batch,
    )


# -- what follows training -------------------------------------------------------------------------------------------


def pipeline_values(sizes: Sizes) -> int:
    """Parameters of the upgraded pipeline."""
    return sizes.text.parameters + sizes.transformer + sizes.detail_vae


def export(sizes: Sizes) -> Phase:
    """One process, in main memory: the base, the transformer with its LoRA folded in, and what was trained."""
    recipe = sizes.recipe
    width = 4 if recipe.export.dtype == "float32" else 2
    written = width * pipeline_values(sizes) + 4 * sizes.trained
    held = 4 * (sizes.text.parameters + sizes.base_vae + 2 * sizes.transformer + sizes.detail_vae)
    held += 4 * 2 * sizes.trained
    host = HOST_RUNTIME + held
    machine = host + (sizes.local - 1) * HOST_RUNTIME
    read = 4 * (sizes.text.parameters + sizes.transformer)
    return Phase("export", host=host, machine=machine, disk=written, seconds=(read + written) / DISK_RATE)


@dataclass(frozen=True)
class Drawn:
    """Bytes of drawing one image with a pipeline."""

    one: int
    weights: int


def drawn_request(sizes: Sizes, side: int, *, upgraded: bool) -> tuple[Any, ...]:
    """Return what the memory of drawing side x side latents depends on."""
    return sizes.shapes, sizes.layout, side, sizes.precision, upgraded


def drawn(sizes: Sizes, *, upgraded: bool) -> Drawn:
    """Of the base at the upgrade's size, or of the upgrade; decoding in tiles where one whole image does not fit."""
    shapes, layout, recipe, dtype = sizes.shapes, sizes.layout, sizes.recipe, sizes.precision
    side = recipe.resolution // (shapes.vae_factor * (layout.scale if upgraded else 1))
    channels = layout.channels if upgraded else layout.base_channels

    def decoding(tile: int | None = None) -> int:
        vae = sizes.meta_detail() if upgraded else meta_autoencoder(shapes)
        return decode_sampling_bytes(vae, channels, side, dtype, tile)

    def a_pass() -> int:
        with torch.device("meta"):
            transformer = meta_transformer(shapes)
            if upgraded:
                transformer = expand_transformer(transformer, layout.detail_channels)
        try:
            return transformer_sampling_bytes(transformer, side, sizes.passes, dtype)
        except ValueError:  # the base has no positions for the larger size, and is not drawn there
            return 0

    asked = drawn_request(sizes, side, upgraded=upgraded)
    values = sizes.text.parameters + sizes.transformer + (sizes.detail_vae if upgraded else sizes.base_vae)
    weights = dtype.itemsize * values
    decode = rehearsed(decoding, "decode", asked)
    if upgraded and weights + decode > sizes.budget:
        decode = rehearsed(lambda: decoding(TILE), "decode in tiles", asked)
    step = rehearsed(a_pass, "pass", sizes.passes, asked)
    return Drawn(max(decode, step), weights)


def in_precision_of_report(recipe: Recipe) -> Recipe:
    """Return a recipe whose run computes as its report does."""
    if recipe.report.dtype is None:
        return recipe
    name = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[recipe.report.dtype]
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"mixed_precision": name})})


def report(sizes: Sizes) -> Phase:
    """One process: samples of base and upgrade, reconstructions, timings; one model at a time on the device."""
    sizes = replace(sizes, recipe=in_precision_of_report(sizes.recipe))
    recipe = sizes.recipe
    at_most = recipe.report.batch_size or REPORT_BATCH
    models = [drawn(sizes, upgraded=upgraded) for upgraded in (False, True)]
    vae = sizes.precision.itemsize * (sizes.detail_vae + sizes.base_vae)
    encode = encoding(sizes)
    parts = [*models, Drawn(encode, vae)]
    batch = min(largest_batch(part.one, sizes.budget - part.weights, at_most) for part in parts)
    prompts, steps = max(1, len(recipe.sampling.prompts) or 8), recipe.sampling.steps
    a_pass = sizes.native_flops + 2 * sizes.upgraded_flops
    drawing = steps * sizes.passes * a_pass + 3 * sizes.decode_flops
    pictures = prompts + recipe.report.timing_repeats + 1
    coding = 4 * recipe.report.holdout_pictures * (sizes.encode_flops + sizes.decode_flops)
    host = HOST_RUNTIME + sum(model.weights for model in models)
    return Phase(
        "report",
        device=max(part.weights + batch * part.one for part in parts),
        host=host,
        machine=host + (sizes.local - 1) * HOST_RUNTIME,
        disk=4 * prompts * sizes.image_bytes(recipe.resolution) // 4,
        seconds=sizes.seconds(pictures * drawing + coding, 1),
        batch=batch,
    )


def sampling(sizes: Sizes) -> Phase:
    """One image by the upgraded pipeline, all parts on the device."""
    recipe = sizes.recipe
    model = drawn(sizes, upgraded=True)
    flops = recipe.sampling.steps * sizes.passes * sizes.upgraded_flops + sizes.decode_flops
    host = HOST_RUNTIME + model.weights
    return Phase(
        "sampling",
        device=model.weights + model.one,
        host=host,
        machine=host,
        disk=sizes.image_bytes(recipe.resolution) // 4,
        seconds=sizes.seconds(flops + sizes.passes * sizes.text.flops, 1),
        batch=1,
    )
