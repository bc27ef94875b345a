"""Retention: how much of the base's knowledge an upgrade keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.analyze.figure import SHOWN, contact_sheet, figure_settings, summary_file, write_figure
from davae.analyze.gap import drawn_latents
from davae.backbones.classes import goes_by_class
from davae.backbones.families import denoiser, family_of
from davae.data.images import to_images, to_tensor
from davae.dataset.look import as_data, images_and_prompts, real_pictures
from davae.errors import ModelError
from davae.evaluate.reconstruction import perceptual_distances
from davae.pretrained.lora_files import check_lora_file
from davae.pretrained.prompting import embed_captions
from davae.pretrained.shapes import default_resolution, pixel_factor
from davae.recipes.sections import Data
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, add_lora, check_class_prompts, open_model
from davae.sample.preview import takes_callback
from davae.tasks.noising import Objective, choose_objective
from davae.vae.detail_vae import DetailVAE
from davae.vae.overflow import decode_in_range, encode_in_range

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the way to noise


def retention_figure(
    base: str,
    upgrade: str,
    data: str | Data,
    out: Path,
    options: SamplingOptions,
    *,
    num: int,
    held_out: float,
    drawn: int = 8,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    lora: Path | None = None,
) -> Path:
    """Compare an upgrade's base channels with the pretrained model's, and write the figure.

    Args:
        base, upgrade: the pretrained model and its upgrade.
        data: images at which predictions are compared.
        out: folder of the figure.
        options: how images are drawn, at the models' own sizes, and where both models compute.
        num: most images to compare at.
        held_out: share of the images that is held out and compared at; 0 takes all.
        drawn: images drawn by both from the same base noise.
        lpips: network of an LPIPS distance; None leaves it out.
        lpips_weights: file of its weights.
        lora: a LoRA of the base whose effect on both is compared; None leaves it out.

    Returns:
        The figure: base images of both, from the same noise, without the LoRA. The JSON has `levels`, the `relative_error`
        and `cosine` of the base prediction, mean distances between the images, and `lora`, as `lora_effects` returns it.

    Raises:
        ModelError: models that are not a base and its upgrade, or that cannot be compared; a LoRA that does not fit.
    """
    origin: dict[str, Any] = {"base": base, "upgrade": upgrade, "vae": upgrade, "data": as_data(data).source}
    origin["settings"] = {**figure_settings(data, num, held_out, drawn=drawn, lora=lora), **options.settings}
    origin["settings"] |= {"lpips": lpips, "lpips_weights": lpips_weights and str(lpips_weights)}
    summary = summary_file(out, "retention", origin)
    if lora is not None:
        check_lora_file(lora)
    measures = perceptual_distances(lpips, lpips_weights)
    first, second = (open_model(name, options.placement)[0] for name in (base, upgrade))
    check_pair(first, second, lora)
    held = real_pictures(data, default_resolution(second), held_out, "held_out", summary=summary)
    images, captions = images_and_prompts(held, goes_by_class(second), num)
    check_class_prompts(second, captions)
    levels = prediction_errors(first, second, images, captions, base, options.seed, options.batch_size)
    rows = _images_of_both(first, second, captions[:drawn], options)
    figures: dict[str, Any] = {
        **origin,
        "levels": levels,
        "images": {"drawn": len(rows["base"]), **_distances(rows, measures)},
    }
    if lora is not None:
        effect = lora_effects(first, second, images, captions, lora, base, options.seed, options.batch_size)
        figures["lora"] = {"file": str(lora), "levels": effect}
    return write_figure(out, "retention", contact_sheet({n: r[:SHOWN] for n, r in rows.items()}, 128), figures)


def check_pair(base: Any, upgraded: Any, lora: Path | None = None) -> None:
    """Refuse two pipelines that are not a base and its upgrade, or a LoRA of another model.

    Args:
        base: the pretrained pipeline.
        upgraded: its upgrade.
        lora: a LoRA of the base, loaded into both and taken out again.

    Raises:
        ModelError: in one line, what does not fit.
    """
    if isinstance(base.vae, DetailVAE):
        raise ModelError("BASE: an upgraded model; give the pretrained one first, its upgrade second")
    if not isinstance(upgraded.vae, DetailVAE):
        raise ModelError("UPGRADE: no upgraded model; give the pretrained one first, its upgrade second")
    kinds = type(denoiser(base)).__name__, type(denoiser(upgraded)).__name__
    if kinds[0] != kinds[1]:
        raise ModelError(f"UPGRADE: a {kinds[1]}, the base is a {kinds[0]}; give an upgrade of that base")
    if not takes_callback(upgraded):
        raise ModelError(
            f"a {type(upgraded).__name__} shows no latents while it draws; its images cannot be compared"
        )
    if lora is not None:
        for pipeline in (upgraded, base):  # the upgrade first: its line names the layer that does not fit
            add_lora(pipeline, lora)
            pipeline.unload_lora_weights()


@torch.no_grad()
def prediction_errors(
    base: Any, upgraded: Any, images: Tensor, captions: list[str], name: str = "base", seed: int = 0, batch: int = 16
) -> list[dict[str, float]]:
    """Return the errors of the upgrade's base prediction by noise level.

    relative_error = |v_upgrade - v_base|^2 / |v_base|^2 over the base channels, at x_t = a z + s n with the same z and n;
    the upgrade sees the detail of the same images at the same level. 0 for a warm start, at every level.

    Args:
        images: (N,3,sH,sW) in [-1,1].
        captions: prompts, or classes.
        batch: images that the models see at a time; the errors do not depend on it.
    """
    return [
        {
            "level": level,
            "relative_error": float((found - known).square().sum() / known.square().sum()),
            "cosine": float(F.cosine_similarity(found.flatten(1), known.flatten(1)).mean()),
        }
        for level, known, found in _predictions(base, upgraded, images, captions, name, seed, batch)
    ]


@torch.no_grad()
def lora_effects(
    base: Any,
    upgraded: Any,
    images: Tensor,
    captions: list[str],
    file: Path,
    name: str = "base",
    seed: int = 0,
    batch: int = 16,
) -> list[dict[str, float]]:
    """Compare the effect of a LoRA of the base on both predictions, by noise level.

    With change = v_with - v_without over the base channels, at the same x_t: `cosine` of both changes, the mean over the
    images; `ratio` = |change of the upgrade| / |change of the base|; `base_change` and `upgrade_change` = |change| /
    |v_without|. A warm start has cosine and ratio 1.

    Args:
        base, upgraded: both pipelines; they keep the LoRA.
        images: (N,3,sH,sW) in [-1,1].
        captions: prompts, or classes.
        file: the LoRA, .safetensors.
        name: of the base, for messages.
        batch: images that the models see at a time.

    Raises:
        ModelError: a LoRA that does not fit, or that changes nothing.
    """
    before = list(_predictions(base, upgraded, images, captions, name, seed, batch))
    add_lora(base, file)
    add_lora(upgraded, file)
    rows = []
    for (level, known, found), (_, known_with, found_with) in zip(
        before, _predictions(base, upgraded, images, captions, name, seed, batch), strict=True
    ):
        change, own = known_with - known, found_with - found
        if not change.any():
            raise ModelError(f"--lora {file}: it does not change the base's prediction; give a LoRA of its denoiser")
        rows.append(
            {
                "level": level,
                "cosine": float(F.cosine_similarity(own.flatten(1), change.flatten(1)).mean()),
                "ratio": float(own.norm() / change.norm()),
                "base_change": float(change.norm() / known.norm()),
                "upgrade_change": float(own.norm() / found.norm()),
            }
        )
    return rows


def _predictions(
    base: Any, upgraded: Any, images: Tensor, captions: list[str], name: str, seed: int, batch: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield each level and both models' predictions of the base channels (N,C,h,w) on the CPU."""
    layout, objective = upgraded.vae.layout, choose_objective(base.scheduler, family_of(base), name)
    latents = torch.cat([encode_in_range(upgraded.vae, part).float().cpu() for part in images.split(batch)])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    times = [_times(objective, level, len(latents)) for level in LEVELS]
    states = [objective.noised(latents, noise, t) for t in times]
    known = _predicted(base, [layout.split(x_t)[0] for x_t in states], times, captions, batch)
    found = _predicted(upgraded, states, times, captions, batch)
    yield from zip(LEVELS, known, [layout.split(one)[0] for one in found], strict=True)


def _times(objective: Objective, level: float, count: int) -> Tensor:
    if objective.prediction == "flow":
        return torch.full((count,), level)
    steps = len(objective.alphas_cumprod)  # type: ignore[attr-defined]
    return torch.full((count,), int(level * (steps - 1)), dtype=torch.long)


def _predicted(
    pipeline: Any, states: list[Tensor], times: list[Tensor], captions: list[str], batch: int
) -> list[Tensor]:
    """Return a model's predictions (N,c,h,w) of states on the CPU."""
    model, device = denoiser(pipeline), pipeline._execution_device
    family = family_of(model)
    call = family.require_call().for_pipeline(pixel_factor(pipeline), pipeline.scheduler)
    parts = [slice(start, start + batch) for start in range(0, len(captions), batch)]
    if family.condition == "text":
        given = [[e.cpu() for e in embed_captions(pipeline, captions[part], family.class_name)] for part in parts]
    else:
        given = [[torch.tensor([int(caption) for caption in captions[part]])] for part in parts]
    found = []
    for x_t, t in zip(states, times, strict=True):
        rows = []
        for part, prompts in zip(parts, given, strict=True):
            x, there = x_t[part].to(device, model.dtype), tuple(one.to(device) for one in prompts)
            rows.append(call.predict(model, model.config, x, t[part].to(device), there).float().cpu())
        found.append(torch.cat(rows))
    pipeline.maybe_free_model_hooks()  # with `--offload model` the next model has the GPU to itself
    return found


@torch.no_grad()
def _distances(rows: dict[str, list[Any]], measures: dict[str, nn.Module]) -> dict[str, float]:
    """Return mean perceptual distances between the two rows of images."""
    pairs = [[to_tensor(image)[None] for image in pair] for pair in zip(*rows.values(), strict=True)]
    return {name: float(torch.cat([measure(*pair) for pair in pairs]).mean()) for name, measure in measures.items()}


@torch.no_grad()
def _images_of_both(base: Any, upgraded: Any, prompts: list[str], options: SamplingOptions) -> dict[str, list[Any]]:
    """Draw images of both models from equal base noise, the upgrade's from its base channels."""
    shown: list[Any] = []
    for latents in drawn_latents(upgraded, prompts, options):
        pixels = decode_in_range(base.vae, upgraded.vae.base_latents(latents))  # (B,3,H,W)
        shown += to_images(pixels.float().clamp(-1, 1))
    size = default_resolution(upgraded) // upgraded.vae.layout.scale
    return {"base": generate(base, prompts, replace(options, resolution=size)), "upgrade's base": shown}
