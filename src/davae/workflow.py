"""An upgrade from start to report: what `davae upgrade` runs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from davae.analyze.curves import loss_curves
from davae.analyze.report import Column, ReportContent, write_report
from davae.data.pictures import Pictures, split, to_images, to_tensor
from davae.data.sources import open_source, usable
from davae.evaluate.detail_use import reconstructions
from davae.evaluate.generation import GaussianFit, Lite0Features, fit, frechet_distance
from davae.evaluate.reconstruction import score_reconstructions
from davae.evaluate.throughput import Timing, time_pipelines
from davae.losses.perceptual import Lite0Distance
from davae.models.detail_vae import DetailVAE
from davae.models.families import check_autoencoder
from davae.models.pipeline import ModelError, load_pipeline
from davae.sample.generate import generate, grid
from davae.train.export import load_upgraded
from davae.train.loop import Observer, Progress
from davae.train.plan import count
from davae.train.state import read_metrics, saving
from davae.train.upgrade import Upgrade
from davae.zoo import resolve, shipped_upgrade

SHOWN_RECONSTRUCTIONS = 8
OPENMOJI_CREDIT = (
    "Artwork: OpenMoji (openmoji.org), CC BY-SA 4.0. Pictures made from it by this run are under the same licence."
)


def upgrade(run: Upgrade, observer: Observer) -> Path:
    """Every step of the recipe, then the report; returns the report's path. Finished steps are skipped."""
    run.run()
    page = run.out / "report.html"
    if not (run.folder.done("report") and page.is_file()):
        page = report(run, observer)
        run.folder.mark_done("report")
    return page


def enlarge(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def default_prompts(run: Upgrade) -> list[str]:
    """The recipe's prompts, else captions of the first training pictures."""
    if run.recipe.sampling.prompts:
        return list(run.recipe.sampling.prompts)
    pictures = run.pictures(run.train)
    return [pictures[(i, -1)]["caption"] for i in range(min(8, len(pictures)))]


def report(run: Upgrade, observer: Observer) -> Path:
    """Sample, reconstruct, time, plot, and write the page of a finished run."""
    recipe = run.recipe
    upgraded = load_pipeline(str(run.out / "pipeline"))
    shipped = shipped_upgrade(recipe.base.model)
    shipped_pipeline = load_upgraded(run.base, shipped) if shipped is not None and shipped.is_dir() else None

    prompts = default_prompts(run)
    samples = sample_columns(run, upgraded, shipped_pipeline, prompts)
    observer(Progress("report", 1, 4, 0.0))
    pictures, quality = reconstruction_section(run, upgraded, shipped_pipeline)
    observer(Progress("report", 2, 4, 0.0))
    speed = speed_section(run, upgraded, prompts[0])
    observer(Progress("report", 3, 4, 0.0))
    records = read_metrics(run.out / "metrics.jsonl")
    openmoji = recipe.data.source == "openmoji" or recipe.base.model == "micro"
    content = ReportContent(
        title=f"{recipe.name}: {recipe.base.resolution} to {recipe.resolution} pixels at the same tokens",
        lead=lead(run, shipped_pipeline is not None),
        facts=facts(run, upgraded),
        command=f"davae upgrade {run.out / 'recipe.yaml'} --out NEW_FOLDER",
        prompts=prompts,
        samples=samples,
        reconstructions=pictures,
        speed=speed,
        quality=quality,
        curves={
            "Stage 1: the detail-aligned VAE": loss_curves(records, "stage1"),
            "Stage 2: velocity error of base and detail channels (Fig. S3), and the weight w(n) of Eq. 12": loss_curves(
                records, "stage2"
            ),
        },
        skipped=sorted(set(run.skipped)),
        credits=OPENMOJI_CREDIT if openmoji else "",
    )
    page = write_report(content, run.out)
    observer(Progress("report", 4, 4, 0.0))
    return page


def lead(run: Upgrade, shipped: bool) -> str:
    recipe = run.recipe
    text = (
        f"{run.shapes.transformer_class} of {recipe.base.model}: {run.layout.detail_channels} detail channels joined its "
        f"{run.layout.base_channels} base channels. Stage 1 ran {recipe.stage1.max_steps} steps of "
        f"{recipe.stage1.batch_size}, stage 2 {recipe.stage2.max_steps} steps of {recipe.stage2.batch_size}, here."
    )
    if shipped:
        text += (
            " The column 'this run' is what this machine trained just now; 'shipped' is the upgrade of the same base that "
            "comes with davae and was trained longer."
        )
    return text


def facts(run: Upgrade, upgraded: Any) -> list[tuple[str, str]]:
    recipe, layout = run.recipe, run.layout
    side = recipe.base.resolution // run.shapes.vae_factor
    tokens = (side // run.shapes.patch_size) ** 2
    return [
        ("pixels", f"{recipe.base.resolution}² → {recipe.resolution}²"),
        ("image tokens", f"{tokens} (native: {tokens * recipe.scale**2})"),
        ("latent", f"{side}×{side}×({layout.base_channels} + {layout.detail_channels})"),
        ("transformer", f"{count(upgraded.transformer.parameters()) / 1e6:.2f} M parameters"),
        ("detail VAE", f"{count(upgraded.vae.parameters()) / 1e6:.2f} M parameters"),
        ("training pictures", str(len(run.train))),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"),
    ]


def sample_columns(run: Upgrade, upgraded: Any, shipped: Any, prompts: list[str]) -> list[Column]:
    recipe = run.recipe
    high, low = recipe.resolution, recipe.base.resolution
    options: dict[str, Any] = {
        "steps": recipe.sampling.steps,
        "guidance_scale": recipe.sampling.guidance_scale,
        "seed": recipe.sampling.seed,
    }
    base = [enlarge(picture, high) for picture in generate(run.base, prompts, resolution=low, **options)]
    columns = [
        Column("base, enlarged", base, f"{low} px, bilinear to {high}"),
        Column(
            "base, native",
            generate(run.base, prompts, resolution=high, **options),
            f"{high} px, 4x the tokens",
        ),
        Column(
            "this run",
            generate(upgraded, prompts, resolution=high, **options),
            f"{high} px, same tokens as {low}",
        ),
    ]
    columns[1].note = f"{high} px, {recipe.scale**2}x the tokens"
    if shipped is not None:
        columns.append(Column("shipped", generate(shipped, prompts, resolution=high, **options), "trained longer"))
    return columns


def reconstruction_section(run: Upgrade, upgraded: Any, shipped: Any) -> tuple[list[Column], list[dict[str, Any]]]:
    """Held-out pictures (training pictures where nothing is held out), shown and scored."""
    indices = (run.held_out or run.train)[: run.recipe.report.holdout_pictures]
    dataset = run.pictures(indices)
    images = torch.stack([dataset[(i, -1)]["image"] for i in range(len(dataset))])
    methods = reconstructions(upgraded.vae, run.base.vae)
    if shipped is not None:
        methods["full, shipped"] = reconstructions(shipped.vae, run.base.vae)["full"]
    perceptual = Lite0Distance()
    columns = [Column("original", to_images(images[:SHOWN_RECONSTRUCTIONS]))]
    rows: list[dict[str, Any]] = []
    for name, reconstruct in methods.items():
        columns.append(Column(name, to_images(reconstruct(images[:SHOWN_RECONSTRUCTIONS]))))
        scores = score_reconstructions(images.split(16), reconstruct, perceptual)
        rows.append({"name": name, **scores.as_dict(), "best": name.startswith("full")})
    return columns, rows


def speed_section(run: Upgrade, upgraded: Any, prompt: str) -> list[dict[str, Any]]:
    recipe = run.recipe
    high, low = recipe.resolution, recipe.base.resolution
    rows: list[Timing] = time_pipelines(
        [
            (f"base at {low}, enlarged", run.base, low, partial(enlarge, size=high)),
            (f"base native at {high}", run.base, high, lambda picture: picture),
            ("upgraded", upgraded, high, lambda picture: picture),
        ],
        prompt,
        steps=recipe.sampling.steps,
        guidance_scale=recipe.sampling.guidance_scale,
        repeats=recipe.report.timing_repeats,
    )
    native = rows[1].whole
    return [
        {
            "name": row.name,
            "pixels": high,
            "tokens": row.tokens,
            "transformer_seconds": row.transformer,
            "whole_seconds": row.whole,
            "speedup_over_native": native / row.whole,
            "upgraded": row.name == "upgraded",
        }
        for row in rows
    ]


def open_model(name: str) -> tuple[Any, Path]:
    """(pipeline, folder for its samples) of a run folder, a pipeline folder, an embedded model or a hub id."""
    folder = Path(name)
    if (folder / "pipeline" / "model_index.json").is_file():
        return load_pipeline(str(folder / "pipeline")), folder / "samples"
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"run {name} has no pipeline yet; run its `davae upgrade` command to the end")
    return load_pipeline(resolve(name)), Path("samples") / folder.name


def sample_to_folder(
    pipeline: Any,
    prompts: list[str],
    folder: Path,
    *,
    num: int,
    seed: int,
    steps: int,
    guidance: float,
    on_batch: Callable[[int, int], None],
) -> Path:
    """Write `num` pictures of every prompt and one grid, a row a prompt; returns the grid's path."""
    wanted = [prompt for prompt in prompts for _ in range(num)]
    pictures = generate(pipeline, wanted, steps=steps, guidance_scale=guidance, seed=seed, on_batch=on_batch)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (prompt, picture) in enumerate(zip(wanted, pictures, strict=True)):
            words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40] or "picture"
            picture.save(folder / f"{words}-seed{seed}-{number:03d}.png")
        sheet = folder / f"grid-seed{seed}.png"
        grid(pictures, num).save(sheet)
    return sheet


def open_autoencoder(name: str) -> Any:
    """A DetailVAE or any supported diffusers autoencoder, from its folder, a run folder or an embedded model."""
    folder = Path(resolve(name))
    for candidate in (folder, folder / "vae"):
        config = candidate / "config.json"
        if config.is_file():
            kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
            if kind == "DetailVAE":
                return DetailVAE.from_pretrained(candidate).eval()
            try:
                check_autoencoder(str(kind))
            except ValueError as error:
                raise ModelError(f"{candidate}: {error}") from error
            return getattr(diffusers, str(kind)).from_pretrained(candidate, torch_dtype=torch.float32).eval()
    raise ModelError(f"{name} is no autoencoder folder (no config.json there or in vae/)")


def real_pictures(data: str, resolution: int, held_out: float = 0.0) -> Pictures:
    """All pictures of a source at `resolution`, or only its held-out share."""
    source = open_source(data, resolution)
    indices = split(source, held_out).held_out if held_out else list(range(len(source)))
    return Pictures(source, usable(source, indices, resolution), resolution)


def batches(pictures: Pictures, num: int | None = None, size: int = 16) -> Iterator[Tensor]:
    """Plain pictures in order, (B,3,R,R)."""
    count = len(pictures) if num is None else min(num, len(pictures))
    for start in range(0, count, size):
        yield torch.stack([pictures[(i, -1)]["image"] for i in range(start, min(start + size, count))])


def evaluate_reconstruction(
    vae: str, data: str, resolution: int | None, num: int | None, held_out: float
) -> dict[str, Any]:
    """Figures of `davae evaluate reconstruction`."""
    model = open_autoencoder(vae)
    size = resolution or int(model.config["sample_size"])

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        return model.decode(model.encode(images).latent_dist.mode()).sample

    scores = score_reconstructions(batches(real_pictures(data, size, held_out), num), reconstruct)
    return {"vae": vae, "data": data, "resolution": size, **scores.as_dict()}


def evaluate_generation(
    pipeline: str,
    data: str,
    *,
    num: int,
    resolution: int | None,
    compare_at: int | None,
    steps: int,
    guidance: float,
    seed: int,
    on_batch: Callable[[int, int], None],
) -> dict[str, Any]:
    """Figures of `davae evaluate generation`: FD-lite0 between samples and real pictures of the same captions."""
    model, _ = open_model(pipeline)
    own = model.transformer.config["sample_size"] * model.vae_scale_factor
    size = compare_at or resolution or own
    pictures = real_pictures(data, size)
    order = np.random.default_rng(seed).permutation(max(num, len(pictures)))[:num] % len(pictures)
    prompts = [pictures[(int(i), -1)]["caption"] for i in order]
    network = Lite0Features()
    real = fit(batches(pictures), network)
    generated = GaussianFit()
    for start in range(0, num, 64):
        samples = generate(
            model,
            prompts[start : start + 64],
            resolution=resolution,
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            first=start,
            batch_size=32,
        )
        generated.update(network(torch.stack([to_tensor(enlarge(sample, size)) for sample in samples])))
        on_batch(min(start + 64, num), num)
    return {
        "pipeline": pipeline,
        "data": data,
        "fd_lite0": frechet_distance(generated, real),
        "generated": num,
        "real": real.count,
        "resolution": resolution or own,
        "compared_at": size,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
    }
