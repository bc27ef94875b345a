"""What `davae analyze` does: figures of the paper for any run, each a PNG to look at and a JSON of its numbers."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from davae.analyze.curves import compared_curves, loss_curves
from davae.analyze.detail_use import UNIT_NORMAL, reconstructions
from davae.analyze.latents import class_knowledge, embed_points, pca_pictures, scatter_plot
from davae.data.formats import open_image
from davae.data.images import ImageDataset, to_images
from davae.dataset.look import as_data, batches, numbered_batches, real_pictures
from davae.errors import DataError, ModelError
from davae.evaluate.features import make_extractor
from davae.evaluate.generation import open_autoencoder
from davae.evaluate.reconstruction import perceptual_distances, score_reconstructions
from davae.evaluate.spectra import radial_power, spectra_plot
from davae.files.outputs import check_figures, check_image, save_image, write_figures
from davae.files.reading import load_json
from davae.losses.alignment import group_mean
from davae.recipes.sections import Data
from davae.train.run_folder import read_metrics
from davae.vae.detail_vae import DetailVAE

SHOWN = 8  # images in a figure
ORIGIN = ("run", "vae", "unaligned", "base", "data", "settings")  # keys of what a figure was made of
RANDOM = {
    "random detail": "channel means and deviations of the training set",
    UNIT_NORMAL: "N(0, I), as in the paper",
}


def open_detail_vae(name: str) -> DetailVAE:
    """A DetailVAE's folder, or a run's; ModelError for any other autoencoder."""
    vae = open_autoencoder(name)
    if not isinstance(vae, DetailVAE):
        raise ModelError(
            f"{name} is a {type(vae).__name__}; this analysis needs a DetailVAE (a run's folder or its vae/)"
        )
    return vae


def check_figure(out: Path, name: str) -> None:
    """Refuse a place for a figure where something that davae did not write has its name, before any work.

    Raises:
        RunError: in one line, what is there.
    """
    check_image(out / f"{name}.png")
    check_figures(out / f"{name}.json")


def free_name(out: Path, name: str, figures: dict[str, Any]) -> str:
    """Return the name under which to write a figure: figures of other models or data keep theirs.

    Args:
        figures: values of the new figure; what it was made of is under `run`, `vae`, `unaligned`, `base`, `data`, `settings`.
    """

    def origin(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            return {}
        compared = {name: row["run"] for name, row in values.items() if isinstance(row, dict) and "run" in row}
        return {**{key: values.get(key) for key in ORIGIN}, "compared": compared}

    again, chosen = 1, name
    while (out / f"{chosen}.png").exists() or (out / f"{chosen}.json").exists():
        check_figure(out, chosen)
        try:
            there = load_json((out / f"{chosen}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if origin(there) == origin(json.loads(json.dumps(figures))):
            break
        again += 1
        chosen = f"{name}-{again}"
    return chosen


def write_figure(out: Path, name: str, picture: bytes | Image.Image, figures: dict[str, Any]) -> Path:
    """Write `name.png` and `name.json` into a folder and return the image's path.

    A figure of another run, model or data that has the name already is kept: the new one is `name-2`, `name-3`, ...
    """
    name = free_name(out, name, figures)
    path = out / f"{name}.png"
    save_image(open_image(io.BytesIO(picture)) if isinstance(picture, bytes) else picture, path)
    write_figures(out / f"{name}.json", figures)
    return path


def figure_settings(data: str | Data, num: int, held_out: float) -> dict[str, Any]:
    """Return what else a figure depends on, by which it is known from others of the same name."""
    options = as_data(data).model_dump(mode="json", exclude_defaults=True, exclude={"source"})
    return {"num": num, "held_out": held_out, **({"options": options} if options else {})}


def contact_sheet(rows: dict[str, list[Image.Image]], cell: int) -> Image.Image:
    """Pictures in named rows, on white."""
    label, gap = 120, 4
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (label + columns * (cell + gap), len(rows) * (cell + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, (name, pictures) in enumerate(rows.items()):
        top = line * (cell + gap)
        draw.text((6, top + cell // 2 - 8), name, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (label + column * (cell + gap), top))
    return sheet


def sensitivity(
    vae: str,
    base: str,
    data: str | Data,
    out: Path,
    *,
    num: int,
    held_out: float,
    lpips: str | None = None,
    lpips_weights: str | None = None,
    features: str = "lite0",
    feature_weights: Path | None = None,
) -> Path:
    """Decoder sensitivity (Tab. S2a, S3): what full, zeroed and random detail decode to, beside base + bicubic.

    Random detail comes twice: with the statistics of the training set, and from N(0, I) as in the paper. Each row has PSNR,
    SSIM, perceptual distances and the Frechet distance to the originals (rFID with Inception's features).
    """
    check_figure(out, "sensitivity")
    model, base_vae = open_detail_vae(vae), open_autoencoder(base)
    pictures = real_pictures(
        data, int(model.config["sample_size"]), held_out, "held_out", summary=out / "sensitivity.data.json"
    )
    perceptual, extractor = perceptual_distances(lpips, lpips_weights), make_extractor(features, feature_weights)
    shown = next(batches(pictures, SHOWN, SHOWN))
    rows, figures = {"original": to_images(shown)}, {}
    for name, reconstruct in reconstructions(model, base_vae, unit_normal=True).items():
        rows[name] = to_images(reconstruct(shown))
        scores = score_reconstructions(batches(pictures, num), reconstruct, perceptual, extractor)
        figures[name] = scores.as_dict() | ({"random": RANDOM[name]} if name in RANDOM else {})
    source = as_data(data).source
    settings = figure_settings(data, num, held_out) | {"features": features, "lpips": lpips}
    return write_figure(
        out,
        "sensitivity",
        contact_sheet(rows, 128),
        {"vae": vae, "base": base, "data": source, "settings": settings, "rows": figures},
    )


@torch.no_grad()
def raw_latents(vae: DetailVAE, pictures: ImageDataset, num: int) -> tuple[Tensor, Tensor, list[int | None]]:
    """(z (N,C,h,w), z_d (N,D,h,w), labels) of pictures; one that cannot be read has neither latents nor a label."""
    parts, labels = [], []
    for positions, images in numbered_batches(pictures, num):
        parts.append(vae.encode_raw(images.to(vae.device)))
        labels += [pictures.source.label(pictures.indices[i]) for i in positions]
    return torch.cat([part.z.cpu() for part in parts]), torch.cat([part.mean.cpu() for part in parts]), labels


def spectra(vae: str, data: str | Data, out: Path, *, num: int, held_out: float) -> Path:
    """Radial spectra of z, z_d and the grouped mean of z_d (Fig. S5): power of standardised channels, absolute energy."""
    check_figure(out, "spectra")
    model = open_detail_vae(vae)
    pictures = real_pictures(
        data, int(model.config["sample_size"]), held_out, "held_out", summary=out / "spectra.data.json"
    )
    z, z_d, _ = raw_latents(model, pictures, num)
    groups = {"z": z, "z_d": z_d, "group mean of z_d": group_mean(z_d, z.shape[1])}
    found = {name: radial_power(latents) for name, latents in groups.items()}
    figures = {
        name: {
            "frequency": s.frequency.tolist(),
            "power": s.power.tolist(),
            "energy": s.energy.tolist(),
            "high_share": s.high_share,
        }
        for name, s in found.items()
    }
    return write_figure(
        out,
        "spectra",
        spectra_plot(found),
        {
            "vae": vae,
            "data": as_data(data).source,
            "settings": figure_settings(data, num, held_out),
            "groups": figures,
        },
    )


def latents(vae: str, unaligned: str | None, data: str | Data, out: Path, *, num: int, held_out: float) -> Path:
    """Latent maps, class separability and a scatter by class (Fig. 3): z, aligned z_d and, from a second run, unaligned z_d.

    The scatter is a figure of its own, `latents-points`.
    """
    check_figure(out, "latents")
    check_figure(out, "latents-points")
    models = {"z_d": open_detail_vae(vae)}
    if unaligned is not None:
        models = {"aligned z_d": models["z_d"], "unaligned z_d": open_detail_vae(unaligned)}
    first = next(iter(models.values()))
    pictures = real_pictures(
        data, int(first.config["sample_size"]), held_out, "held_out", summary=out / "latents.data.json"
    )
    groups: dict[str, Tensor] = {}
    labels: list[int | None] = []
    for name, model in models.items():
        z, z_d, labels = raw_latents(model, pictures, num)
        groups |= {"z": z, name: z_d}
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise DataError(
            "class separability needs a class for every picture: sub-folders, or `.cls` files in the shards"
        )
    rows = {"original": to_images(next(batches(pictures, SHOWN, SHOWN)))}
    figures = {}
    for name, group in groups.items():
        rows[name] = pca_pictures(group, 128)[:SHOWN]
        z = groups["z"]
        alignment = None if name == "z" else float((group_mean(group, z.shape[1]) - z).square().mean() / z.var())
        figures[name] = {**asdict(class_knowledge(group, known)), "alignment_error_over_variance": alignment}
    points = {name: embed_points(group) for name, group in groups.items()}
    places = {name: np.round(found, 3).tolist() for name, found in points.items()}
    origin: dict[str, Any] = {"vae": vae, "unaligned": unaligned, "data": as_data(data).source}
    origin["settings"] = figure_settings(data, num, held_out)
    write_figure(out, "latents-points", scatter_plot(points, known), {**origin, "labels": known, "points": places})
    return write_figure(
        out,
        "latents",
        contact_sheet(rows, 128),
        {**origin, "pictures": len(known), "rows": figures},
    )


def stage2_records(run: Path) -> list[dict[str, Any]]:
    """Return what stage 2 of a run logged; ModelError when it is less than two steps."""
    found = [r for r in read_metrics(run / "metrics.jsonl") if r["stage"] == "stage2"]
    records = [record for record in found if {"loss_base", "loss_detail"} <= record.keys()]
    if len(records) < 2:
        raise ModelError(f"run {run} has logged no two steps of stage 2; train it first, or name another run")
    return records


def curves(run: Path, out: Path) -> Path:
    """Loss curves of a run's stage 2 (Fig. S3)."""
    check_figure(out, "curves")
    records = stage2_records(run)
    picture = loss_curves(records, "stage2")
    assert picture is not None
    return write_figure(out, "curves", picture, {"run": str(run), "last": records[-1]})


def compare(runs: dict[str, Path], out: Path) -> Path:
    """Base and detail loss of several runs side by side: zero against random new weights (Fig. 4), or any others."""
    check_figure(out, "compare")
    records = {name: stage2_records(run) for name, run in runs.items()}
    picture = compared_curves(records, ("loss_base", "loss_detail"))
    figures = {name: {"run": str(runs[name]), "first": r[0], "last": r[-1]} for name, r in records.items()}
    return write_figure(out, "compare", picture, figures)
