"""Distance of an upgrade to real images, split into the parts of decoder, detail and base.

Five sets are compared with the training images, each one step further from the held-out images:

- held-out images as they are: the floor, which two sets of real images have;
- decoded: their latents [z, z_d], encoded and decoded by the DetailVAE;
- detail drawn: their z, and the z_d that the model draws for it with their captions or classes;
- base and detail drawn: samples of the same captions;
- base drawn, no detail: the z of these samples with z_d at its mean, or, with `detail_residual`, as z predicts it.

A run with `stage1.polish` has two more: the latents of `decoded` and of the samples by the decoder before its polish.

All sets have the same number of images, so that the bias of a Frechet distance is the same in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from davae.analyze.figure import SHOWN, check_figure, contact_sheet, figure_settings, summary_file, write_figure
from davae.backbones.classes import goes_by_class
from davae.backbones.packed_latents import latent_size, unpack_latents
from davae.data.images import to_images, to_tensor
from davae.dataset.look import as_data, images_and_prompts, real_pictures
from davae.errors import ModelError
from davae.evaluate.detail import PATCH_SIZE, compare_sets, measure_images
from davae.evaluate.distribution import LEAST, check_enough
from davae.evaluate.features import make_extractor
from davae.evaluate.plot import to_png
from davae.evaluate.real_set import real_images
from davae.pretrained.autoencoders import load_detail_vae
from davae.pretrained.placement import own_device
from davae.pretrained.shapes import default_resolution, pixel_factor
from davae.publish.assemble import POLISHED, VAE_FOLDER
from davae.recipes.sections import Data
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, check_class_prompts, open_model
from davae.sample.upscale import check_enlarging, upscale
from davae.vae.blocks import downsample
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range

REAL, DECODER, DETAIL = "held-out images", "decoded", "detail drawn"
SAMPLES, NO_DETAIL = "base and detail drawn", "base drawn, no detail"
UNPOLISHED, SAMPLES_UNPOLISHED = f"{DECODER}, before polish", f"{SAMPLES}, before polish"
POLISHES = {DECODER: UNPOLISHED, SAMPLES: SAMPLES_UNPOLISHED}
COLORS = {REAL: "0.6", DECODER: "tab:orange", DETAIL: "tab:blue", SAMPLES: "tab:green"}
PARTS = {"decoder": (REAL, DECODER), "detail": (DECODER, DETAIL), "base": (DETAIL, SAMPLES)}


def gap_figure(
    model: str,
    data: str | Data,
    out: Path,
    options: SamplingOptions,
    *,
    num: int,
    held_out: float,
    features: str = "lite0",
    feature_weights: Path | None = None,
    patch_size: int = PATCH_SIZE,
) -> Path:
    """Split an upgrade's distance to real images by cause, and write the figure.

    Args:
        model: an upgraded model.
        data: images of at least the size that the model draws.
        out: folder of the figure. Its `real` keeps the measurements of the training images for a later call.
        options: how images are drawn, at the model's own size; detail for a known base is drawn without guidance.
        num: images of each set, at most.
        held_out: share that was held out of the training.
        features, feature_weights: network of the distances, and the file of its weights.
        patch_size: side of the crops of the patch distance, pixels.

    Returns:
        The path of `gap.png`. `gap.json` has the distances of each set, their `parts` and, of a run with `stage1.polish`,
        `polish_gain`.

    Raises:
        ModelError: a model without a detail part, or no or too few images.
    """
    if not held_out:
        raise ModelError("--held-out 0: the images of the training would be compared with themselves; give its share")
    measure = {"features": features, "feature_weights": feature_weights, "patch_size": patch_size}
    settings = figure_settings(data, num, held_out, **options.settings, **measure)
    origin: dict[str, Any] = {"run": model, "data": as_data(data).source, "settings": settings}
    check_figure(out, "gap-images")
    summary = summary_file(out, "gap", origin)
    extractor = make_extractor(features, feature_weights)
    pipe, batch_size = open_model(model, options.placement)[0], options.batch_size
    check_enlarging(pipe, strength=0.0, steps=options.steps, times=1, batch_size=batch_size)
    size = default_resolution(pipe)
    held = real_pictures(data, size, held_out, "held_out", summary=summary)
    real, prompts = images_and_prompts(held, goes_by_class(pipe), num, batch_size)
    check_class_prompts(pipe, prompts)
    _check_held_out(len(real), held_out)
    others = real_pictures(data, size, held_out, "train")
    check_enough(len(real), len(others))
    network: Any = features, feature_weights, patch_size, out / "real", batch_size
    trained = real_images(others, as_data(data), held_out, *network)
    sets = _sets(pipe, real, prompts, options, decoder_before_polish(Path(model), pipe.vae))
    measured = {
        name: measure_images(images.split(batch_size), extractor, patch_size) for name, images in sets.items()
    }
    rows = {name: compare_sets(found, trained, extractor.name, patch_size) for name, found in measured.items()}
    distances = [key for key in (extractor.name, f"patch_{extractor.name}") if key in rows[REAL]]
    found = _splits({key: {name: row[key] for name, row in rows.items()} for key in distances})
    shown = {name: to_images(images[:SHOWN]) for name, images in sets.items()}
    write_figure(out, "gap-images", contact_sheet(shown, size), origin)
    return write_figure(out, "gap", gap_plot(rows, distances), {**origin, "images": len(real), "rows": rows, **found})


def _splits(distances: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the parts of each distance, and the gain of a polish where there was one."""
    found = {"parts": {key: gap_parts(values) for key, values in distances.items()}}
    polished = {key: polish_gain(values) for key, values in distances.items() if UNPOLISHED in values}
    return found | ({"polish_gain": polished} if polished else {})


def _check_held_out(count: int, share: float) -> None:
    if count < LEAST:
        raise ModelError(f"--held-out {share}: {count} images, at least {LEAST} are needed; hold out more")


def decoder_before_polish(run: Path, vae: DetailVAE) -> DetailVAE | None:
    """Return the DetailVAE before its polish, None for a model that was not polished.

    Args:
        run: the model; a run folder with its own stage 1 has both autoencoders.
        vae: of its pipeline, whose statistics the returned one takes.
    """
    if not all((run / folder / "config.json").is_file() for folder in (VAE_FOLDER, POLISHED)):
        return None
    return autoencoder_like(vae, run / VAE_FOLDER).to(own_device())  # type: ignore[return-value]


def autoencoder_like(vae: DetailVAE, folder: Path) -> DetailVAE:
    """Return the DetailVAE of a folder, made to decode the latents of another.

    Args:
        vae: the other, whose precision and measured statistics it takes.
        folder: of the DetailVAE.
    """
    found = load_detail_vae(folder, vae.dtype)
    found.set_detail_kernel(vae.detail_kernel)
    found.set_detail_statistics(*(torch.tensor(vae.config[f"detail_{name}"]) for name in ("mean", "std")))
    return found


@torch.no_grad()
def _sets(
    pipe: Any, real: Tensor, prompts: list[str], options: SamplingOptions, before: DetailVAE | None
) -> dict[str, Tensor]:
    samples, without, *unpolished = _samples(pipe, prompts, options, before)
    encoded = [encode_in_range(pipe.vae, part) for part in real.split(options.batch_size)]
    sets = {
        REAL: real,
        DECODER: torch.cat([_decoded(pipe.vae, part) for part in encoded]),
        DETAIL: _detail_drawn(pipe, real, prompts, options),
        SAMPLES: samples,
        NO_DETAIL: without,
    }
    if before is not None:
        sets[UNPOLISHED] = torch.cat([_decoded(before, part) for part in encoded])
        sets[SAMPLES_UNPOLISHED] = unpolished[0]
    return sets


def gap_parts(distances: dict[str, float]) -> dict[str, float]:
    """Return what floor, decoder, detail and base add to the distance of the samples.

    The parts sum to that distance. A part is negative where a step brings the set nearer to the training images.

    Args:
        distances: to the training images, by the names of the sets.
    """
    parts = {name: distances[after] - distances[before] for name, (before, after) in PARTS.items()}
    return {"floor": distances[REAL], **parts}


def polish_gain(distances: dict[str, float]) -> dict[str, float]:
    """Return by how much the polish of the decoder lowers the distances.

    Args:
        distances: to the training images, by the names of the sets of encoded and of drawn latents.
    """
    return {name: distances[before] - distances[name] for name, before in POLISHES.items()}


def gap_plot(rows: dict[str, dict[str, float]], distances: list[str]) -> bytes:
    """Return a PNG with a bar for each set, a panel for each distance."""
    size = 2.6 + 3.4 * len(distances), 1.2 + 0.32 * len(rows)  # names of the sets once, on the left
    figure, axes = plt.subplots(1, len(distances), figsize=size, squeeze=False, sharey=True)
    for axis, key in zip(axes[0], distances, strict=True):
        values = [row[key] for row in rows.values()]
        bars = axis.barh(list(rows), values, color=[COLORS.get(name, "0.8") for name in rows])
        axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_xlabel(f"{key} to the training images,\nlower is better")
    axes[0][0].invert_yaxis()
    return to_png(figure)


def _detail_drawn(pipe: Any, real: Tensor, prompts: list[str], options: SamplingOptions) -> Tensor:
    small = to_images(downsample(real, pipe.vae.layout.scale, pipe.vae.config["downsample"]))
    how: dict[str, Any] = {"steps": options.steps, "seed": options.seed, "batch_size": options.batch_size}
    drawn = upscale(pipe, small, prompts, guidance_scale=1.0, faithful=False, **how)
    return torch.stack([to_tensor(image) for image in drawn])


def _decoded(vae: DetailVAE, latents: Tensor) -> Tensor:
    return decode_in_range(vae, latents).float().clamp(-1, 1).cpu()  # (B,3,H,W)


@torch.no_grad()
def _samples(
    pipe: Any, prompts: list[str], options: SamplingOptions, before: DetailVAE | None = None
) -> list[Tensor]:
    """Return samples (N,3,H,W), then without detail, then by the decoder `before` its polish."""
    parts: list[list[Tensor]] = []
    for latents in drawn_latents(pipe, prompts, options):
        z, z_d = pipe.vae.layout.split(latents)
        parts.append(
            [_decoded(pipe.vae, latents), _decoded(pipe.vae, pipe.vae.layout.join(z, torch.zeros_like(z_d)))]
        )
        if before is not None:
            parts[-1].append(_decoded(before, latents))
    return [torch.cat(images) for images in zip(*parts, strict=True)]


def drawn_latents(pipe: Any, prompts: list[str], options: SamplingOptions) -> Iterator[Tensor]:
    """Yield normalised latents, (B,C+D,h,w), of samples of the model's own size."""
    side = default_resolution(pipe) // pixel_factor(pipe)
    for start in range(0, len(prompts), options.batch_size):
        part = prompts[start : start + options.batch_size]
        latents = torch.stack(list(generate(pipe, part, options, output_type="latent", first=start)))
        height, width = latent_size(latents, pipe.vae.layout.channels, (side, side))
        yield unpack_latents(latents, height, width)
