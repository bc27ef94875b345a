"""Device memory, main memory, disk and time of every phase of an upgrade."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from davae.backbones.expand import expand_transformer
from davae.cost.flops import meta_autoencoder, meta_transformer
from davae.cost.memory import TrainingStep, decode_sampling_bytes, encode_bytes, transformer_sampling_bytes
from davae.plan.expected import checkpoint_files
from davae.plan.phase_remedies import check_phase
from davae.plan.phase_sizes import HOST_RUNTIME, Phase, PhaseSizes
from davae.pretrained.memory_budget import TILE, largest_batch
from davae.recipes.hardware import UTILISATION
from davae.recipes.sections import Optim
from davae.recipes.stages import POLISH
from davae.recipes.upgrade import Recipe
from davae.train.shares import Share

DISK_RATE = 1e9  # bytes a second that a run folder's disk writes; an assumption
REPORT_BATCH = 16  # images that the report draws and decodes at a time, at most


def plan_phases(sizes: PhaseSizes) -> list[Phase]:
    """Return the phases in order, six or seven with a polish, each checked against the hardware."""
    polish = () if sizes.recipe.stage1.polish is None else (polish_phase,)
    made = (stage1_phase, cache_phase, *polish, stage2_phase, export_phase, report_phase, sampling_phase)
    phases = [make(sizes) for make in made]
    return [check_phase(phase, sizes, sum(p.disk for p in phases[:n])) for n, phase in enumerate(phases)]


_REHEARSED: dict[str, int] = {}  # request -> bytes; a process plans the same sizes for several phases


def rehearsed(work: Callable[[], int], *asked: Any) -> int:
    """Return `work()`, or its earlier result in this process for an equal request.

    Args:
        work: counts bytes on fake tensors.
        asked: parts of the request; requests are equal whose parts print the same.
    """
    key = repr(asked)
    if key not in _REHEARSED:
        _REHEARSED[key] = work()
    return _REHEARSED[key]


def remember(value: int, *asked: Any) -> None:
    """Let `rehearsed` return a value for a request without rehearsing it."""
    _REHEARSED[repr(asked)] = value


def encoding_bytes(sizes: PhaseSizes, tile: int | None = None) -> int:
    """Return the bytes of encoding one image with the detail VAE in the run's precision."""
    asked = sizes.shapes, sizes.layout, sizes.recipe.resolution, sizes.precision, tile
    return rehearsed(lambda: encode_bytes(sizes.meta_detail(), *asked[2:]), "encode", asked)


# -- training --------------------------------------------------------------------------------------------------------


def training_phase(
    name: str, sizes: PhaseSizes, settings: Optim, step: TrainingStep, share: Share, **counts: int
) -> Phase:
    """Return the phase of one training.

    Args:
        settings: the stage's section of the recipe.
        step, share: of one process.
        counts: `loaded`: bytes that a process reads into main memory on their way to the device. `resident`: bytes on the
            device besides the step. `item`: bytes of an item of a batch. `extra_disk`: bytes of the files that the phase
            leaves besides checkpoints.
    """
    run, recipe = sizes.recipe.run, sizes.recipe
    workers = recipe.stage2_data.num_workers if recipe.stage2_data.num_workers is not None else 8
    checkpoint = 4 * ((step.optimizer + step.gradients + step.ema) // 4)
    average = step.ema if run.ema_device == "cpu" else 0
    queue = 2 * max(1, workers) * share.images * counts["item"]
    first = HOST_RUNTIME + average + queue + max(counts["loaded"], checkpoint)
    other = HOST_RUNTIME + average + queue
    return Phase(
        name,
        device=step.peak + counts["resident"] - average,
        host=first,
        machine=first + (sizes.local - 1) * other,
        disk=checkpoint_files(settings, run) * checkpoint + counts["extra_disk"],
        seconds=step.flops * share.passes * settings.max_steps / (UTILISATION * sizes.gpu.peak),
    )


def stage1_phase(sizes: PhaseSizes) -> Phase:
    alignment = sizes.recipe.stage1.dit_alignment
    phase = _autoencoder_phase("stage1", sizes, sizes.base_vae + sizes.detail_vae)
    if alignment is None or not alignment.weight:
        return phase
    read = sizes.base_bytes * max(sizes.transformer, sizes.text.parameters)  # one after the other
    return replace(phase, host=phase.host + read, machine=phase.machine + read)


def polish_phase(sizes: PhaseSizes) -> Phase:
    """Return the phase of `stage1.polish`, which reads and writes a DetailVAE."""
    return _autoencoder_phase(POLISH, sizes, sizes.detail_vae)


def _autoencoder_phase(name: str, sizes: PhaseSizes, read: int) -> Phase:
    """Return the phase of a training of the DetailVAE, of which `read` parameters are loaded."""
    settings, share, step = sizes.stage(name)
    image = sizes.image_bytes(sizes.recipe.seen_pixels(name))
    return training_phase(
        name,
        sizes,
        settings,
        step,
        share,
        loaded=4 * read,
        resident=share.images * image,
        item=image,
        extra_disk=4 * sizes.detail_vae,
    )


def stage2_phase(sizes: PhaseSizes) -> Phase:
    recipe, step = sizes.recipe, sizes.step2
    resident, loaded = 0, sizes.base_bytes * sizes.transformer + 4 * sizes.trained
    if recipe.stage2.hold_base:  # a copy, in float32 where all weights are trained
        loaded += (4 if recipe.stage2.lora is None else sizes.base_bytes) * sizes.transformer
    if recipe.stage2.validate_every or recipe.run.sample_every:
        resident += 4 * sizes.detail_vae
    text = sizes.text
    if recipe.cache.text == "step":
        resident += sizes.text_device(sizes.share2.images) + 4 * sizes.base_vae
        loaded = max(loaded, sizes.base_bytes * text.parameters)  # read once the transformer is on the device
    item = sizes.latent_bytes + 2 * text.padded_values
    phase = training_phase(
        "stage2",
        sizes,
        recipe.stage2,
        step,
        sizes.share2,
        loaded=loaded,
        resident=resident + sizes.share2.images * 4 * text.padded_values,
        item=item,
        extra_disk=0,
    )
    if recipe.cache.text == "step":
        prompts = sizes.share2.images * sizes.share2.passes * recipe.stage2.max_steps
        phase = replace(phase, seconds=phase.seconds + sizes.seconds(text.flops * prompts, 1))
    return phase


# -- cache -----------------------------------------------------------------------------------------------------------


def cache_phase(sizes: PhaseSizes) -> Phase:
    """Return the phase of the cache: images in the run's precision, then prompts.

    Images are encoded in tiles where one whole image does not fit.
    """
    recipe, text, dtype = sizes.recipe, sizes.text, sizes.precision
    weights = (4 + (dtype.itemsize if dtype.itemsize < 4 else 0)) * sizes.detail_vae
    one = encoding_bytes(sizes) + sizes.image_bytes(recipe.resolution)
    if weights + one > sizes.budget:
        one = encoding_bytes(sizes, TILE)
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


def export_phase(sizes: PhaseSizes) -> Phase:
    """Return the phase of the export, which one process makes in main memory."""
    recipe = sizes.recipe
    width = 4 if recipe.export.dtype == "float32" else 2
    written = width * (sizes.text.parameters + sizes.transformer + sizes.detail_vae) + 4 * sizes.trained
    held = 4 * (sizes.text.parameters + sizes.base_vae + 2 * sizes.transformer + sizes.detail_vae)
    held += 4 * 2 * sizes.trained
    host = HOST_RUNTIME + held
    machine = host + (sizes.local - 1) * HOST_RUNTIME
    read = 4 * (sizes.text.parameters + sizes.transformer)
    return Phase("export", host=host, machine=machine, disk=written, seconds=(read + written) / DISK_RATE)


@dataclass(frozen=True)
class DrawingBytes:
    """Bytes of drawing one image: of its own tensors, and of the weights."""

    one: int
    weights: int


def drawing_request(sizes: PhaseSizes, side: int, *, upgraded: bool) -> tuple[Any, ...]:
    """Return everything that the memory of drawing side x side latents depends on."""
    return sizes.shapes, sizes.layout, side, sizes.precision, upgraded


def drawing_bytes(sizes: PhaseSizes, *, upgraded: bool) -> DrawingBytes:
    """Return the bytes of drawing with the base at the upgrade's size, or with the upgrade.

    The upgrade decodes in tiles where one whole image does not fit.
    """
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

    asked = drawing_request(sizes, side, upgraded=upgraded)
    values = sizes.text.parameters + sizes.transformer + (sizes.detail_vae if upgraded else sizes.base_vae)
    weights = dtype.itemsize * values
    decode = rehearsed(decoding, "decode", asked)
    if upgraded and weights + decode > sizes.budget:
        decode = rehearsed(lambda: decoding(TILE), "decode in tiles", asked)
    return DrawingBytes(max(decode, rehearsed(a_pass, "pass", sizes.passes, asked)), weights)


def in_precision_of_report(recipe: Recipe) -> Recipe:
    """Return the recipe with the precision of its report as that of the run."""
    if recipe.report.dtype is None:
        return recipe
    name = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[recipe.report.dtype]
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"mixed_precision": name})})


def report_phase(sizes: PhaseSizes) -> Phase:
    """Return the phase of the report, which one process makes with one model at a time."""
    sizes = replace(sizes, recipe=in_precision_of_report(sizes.recipe))
    recipe = sizes.recipe
    at_most = recipe.report.batch_size or REPORT_BATCH
    models = [drawing_bytes(sizes, upgraded=upgraded) for upgraded in (False, True)]
    vae = sizes.precision.itemsize * (sizes.detail_vae + sizes.base_vae)
    encode = encoding_bytes(sizes)
    parts = [*models, DrawingBytes(encode, vae)]
    batch = min(largest_batch(part.one, sizes.budget - part.weights, at_most) for part in parts)
    prompts, steps = max(1, len(recipe.sampling.prompts) or 8), recipe.sampling.steps
    a_pass = sizes.native_flops + 2 * sizes.upgraded_flops
    drawing = steps * sizes.passes * a_pass + 3 * sizes.decode_flops
    images = prompts + recipe.report.timing_repeats + 1
    coding = 4 * recipe.report.holdout_pictures * (sizes.encode_flops + sizes.decode_flops)
    host = HOST_RUNTIME + sum(model.weights for model in models)
    return Phase(
        "report",
        device=max(part.weights + batch * part.one for part in parts),
        host=host,
        machine=host + (sizes.local - 1) * HOST_RUNTIME,
        disk=4 * prompts * sizes.image_bytes(recipe.resolution) // 4,
        seconds=sizes.seconds(images * drawing + coding, 1),
        batch=batch,
    )


def sampling_phase(sizes: PhaseSizes) -> Phase:
    """Return the phase of drawing one image with the upgraded pipeline, all parts on the device."""
    recipe = sizes.recipe
    model = drawing_bytes(sizes, upgraded=True)
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
