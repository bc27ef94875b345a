"""Retention: how much of the base's knowledge an upgrade keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.analyze.figure import SHOWN, check_figure, contact_sheet, figure_settings, write_figure
from davae.backbones.classes import goes_by_class
from davae.backbones.families import denoiser, family_of
from davae.data.images import to_tensor
from davae.dataset.look import as_data, images_and_prompts, real_pictures
from davae.errors import ModelError
from davae.evaluate.reconstruction import perceptual_distances
from davae.pretrained.lora_files import check_lora_file
from davae.pretrained.prompting import embed_captions
from davae.pretrained.shapes import default_resolution, pixel_factor
from davae.recipes.sections import Data
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions, add_lora, open_model
from davae.sample.preview import Preview, takes_callback
from davae.tasks.noising import Objective, choose_objective
from davae.vae.detail_vae import DetailVAE

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
        options: how images are drawn, at the models' own sizes.
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
    check_figure(out, "retention")
    if lora is not None:
        check_lora_file(lora)
    measures = perceptual_distances(lpips, lpips_weights)
    first, second = open_model(base)[0], open_model(upgrade)[0]
    check_pair(first, second)
    held = real_pictures(data, default_resolution(second), held_out, "held_out", summary=out / "retention.data.json")
    images, captions = images_and_prompts(held, goes_by_class(second), num)
    levels = prediction_errors(first, second, images, captions, base, options.seed)
    rows = _images_of_both(first, second, captions[:drawn], options)
    distances = _distances(rows, measures)
    figures: dict[str, Any] = {
        "base": base,
        "upgrade": upgrade,
        "vae": upgrade,
        "data": as_data(data).source,
        "settings": figure_settings(data, num, held_out)
        | {"steps": options.steps, "guidance": options.guidance, "seed": options.seed},
        "levels": levels,
        "images": {"drawn": len(rows["base"]), **distances},
    }
    if lora is not None:
        effect = lora_effects(first, second, images, captions, lora, base, options.seed)
        figures["lora"] = {"file": str(lora), "levels": effect}
    return write_figure(out, "retention", contact_sheet({n: r[:SHOWN] for n, r in rows.items()}, 128), figures)


def check_pair(base: Any, upgraded: Any) -> None:
    """Refuse two pipelines that are not a pretrained model and its upgrade.

    Args:
        base: the pretrained pipeline.
        upgraded: its upgrade.

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


@torch.no_grad()
def prediction_errors(
    base: Any, upgraded: Any, images: Tensor, captions: Sequence[str], name: str = "base", seed: int = 0
) -> list[dict[str, float]]:
    """Return the errors of the upgrade's base prediction by noise level.

    relative_error = |v_upgrade - v_base|^2 / |v_base|^2 over the base channels, at x_t = a z + s n with the same z and n;
    the upgrade sees the detail of the same images at the same level. 0 for a warm start, at every level.

    Args:
        images: (N,3,sH,sW) in [-1,1].
        captions: prompts, or classes.
    """
    return [
        {
            "level": level,
            "relative_error": float((found - known).square().sum() / known.square().sum()),
            "cosine": float(F.cosine_similarity(found.flatten(1), known.flatten(1)).mean()),
        }
        for level, known, found in _predictions(base, upgraded, images, captions, name, seed)
    ]


@torch.no_grad()
def lora_effects(
    base: Any,
    upgraded: Any,
    images: Tensor,
    captions: Sequence[str],
    file: Path,
    name: str = "base",
    seed: int = 0,
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

    Raises:
        ModelError: a LoRA that does not fit, or that changes nothing.
    """
    before = list(_predictions(base, upgraded, images, captions, name, seed))
    add_lora(base, file)
    add_lora(upgraded, file)
    rows = []
    for (level, known, found), (_, known_with, found_with) in zip(
        before, _predictions(base, upgraded, images, captions, name, seed), strict=True
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
    base: Any, upgraded: Any, images: Tensor, captions: Sequence[str], name: str, seed: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield each level and both models' predictions of the base channels (N,C,h,w)."""
    vae: DetailVAE = upgraded.vae
    family = family_of(base)
    objective = choose_objective(base.scheduler, family, name)
    generator = torch.Generator().manual_seed(seed)
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()  # type: ignore[union-attr]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    for level in LEVELS:
        t = _times(objective, level, len(latents), latents)
        x_t = objective.noised(latents, noise, t)
        z_t, _ = vae.layout.split(x_t)
        known = _predict(base, z_t, t, captions)
        found, _ = vae.layout.split(_predict(upgraded, x_t, t, captions))
        yield level, known, found


def _times(objective: Objective, level: float, count: int, like: Tensor) -> Tensor:
    if objective.prediction == "flow":
        return torch.full((count,), level, device=like.device, dtype=like.dtype)
    steps = len(objective.alphas_cumprod)  # type: ignore[attr-defined]
    return torch.full((count,), int(level * (steps - 1)), device=like.device, dtype=torch.long)


def _predict(pipeline: Any, x_t: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
    model = denoiser(pipeline)
    family = family_of(model)
    call = family.require_call().for_pipeline(pixel_factor(pipeline), pipeline.scheduler)
    if family.condition == "text":
        parts = embed_captions(pipeline, list(captions), family.class_name)
    else:
        parts = (torch.tensor([int(caption) for caption in captions], device=x_t.device),)
    return call.predict(model, model.config, x_t, t, parts).float()


@torch.no_grad()
def _distances(rows: dict[str, list[Any]], measures: dict[str, nn.Module]) -> dict[str, float]:
    """Return mean perceptual distances between the two rows of images."""
    pairs = [torch.stack([to_tensor(image) for image in row]) for row in rows.values()]
    return {name: float(distance(*pairs).mean()) for name, distance in measures.items()}


@torch.no_grad()
def _images_of_both(base: Any, upgraded: Any, prompts: list[str], options: SamplingOptions) -> dict[str, list[Any]]:
    """Draw images of both models from equal base noise, the upgrade's from its base channels."""
    upgraded.vae.attach_base_decoder(base.vae)
    shown: list[Any] = []
    preview = Preview(upgraded, options.steps, decoder="base", on_preview=lambda step, images: shown.extend(images))
    generate(upgraded, prompts, options, preview=preview)
    size = default_resolution(upgraded) // upgraded.vae.layout.scale
    return {"base": generate(base, prompts, replace(options, resolution=size)), "upgrade's base": shown}
