"""An upgrade from start to report: what `davae upgrade` runs."""

from __future__ import annotations

import logging
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from davae.analyze.curves import loss_curves
from davae.analyze.gap import autoencoder_like
from davae.analyze.sensitivity import reconstructions
from davae.backbones.classes import example_classes, goes_by_class
from davae.backbones.families import denoiser
from davae.backbones.family import longest_side
from davae.cost.flops import count
from davae.data.images import spread_indices, to_images
from davae.data.openmoji import CREDIT
from davae.dataset.encoding import coding_bytes, images_at_a_time, report_precision
from davae.dataset.opened import OpenedData
from davae.errors import ModelError, RecipeError
from davae.evaluate.reconstruction import score_reconstructions
from davae.evaluate.throughput import Timing, time_pipelines
from davae.losses.perceptual import Lite0Distance
from davae.pretrained.memory_budget import Halving, OneOnDevice
from davae.pretrained.open import load_pipeline
from davae.publish.assemble import VAE_FOLDER, load_upgraded
from davae.publish.report_file import read_report
from davae.recipes import Recipe
from davae.recipes.stages import POLISH
from davae.runs.report_page import Column, ReportContent, best_rows, write_report
from davae.runs.upgrade import Upgrade
from davae.sample.generate import generate
from davae.sample.open import SamplingOptions
from davae.tasks.base_model import BaseModel
from davae.train.distributed import from_main, on_main
from davae.train.loop import Observer, Progress
from davae.train.run_folder import read_metrics
from davae.train.signals import check_stop, stop_on_signal
from davae.train.times import read_times, timed
from davae.zoo import shipped_upgrade

logger = logging.getLogger(__name__)

SHOWN_RECONSTRUCTIONS = 8
SHIPPED_ROW = "full, shipped"  # row of the upgrade that comes with davae
BEFORE_POLISH = "full, before the polish"  # row of stage 1's decoder, of a run that trained it further
POLISH_TITLE = "Polish: the decoder on noised latents"
AT_A_TIME = 16  # images that are drawn, or encoded and decoded, at a time, at most


def run_with_report(run: Upgrade, observer: Observer) -> Path:
    """Do every step that is not done, then write the report, and return its path.

    The first process of a launch makes the report alone: it draws and measures the same images in any number of processes.
    """

    def watched(progress: Progress) -> None:
        observer(progress)
        check_stop("the report")

    check_native(run.recipe, run.base)
    with stop_on_signal(run.recipe.run.stop_signals):
        run.check_data()
        run.run()
        page = run.out / "report.html"
        if not from_main(run.folder.done("report") and page.is_file() and has_report(run.out)):
            check_stop("the report")
            with timed(run.out, "report"):
                on_main(partial(write_run_report, run, watched))
            run.folder.mark_done("report")
        check_stop(str(run.out))
    return page


def check_native(recipe: Recipe, base: BaseModel) -> None:
    """Refuse a report of a base that has no positions for an image of the upgrade's size.

    Raises:
        RecipeError: names the size, and the verb that writes no report.
    """
    longest = longest_side(base.shapes.transformer_config)
    side = recipe.resolution // (base.shapes.vae_factor * base.shapes.patch_size)
    if longest is not None and side > longest:
        raise RecipeError(
            f"the report draws {recipe.base.name} at {recipe.resolution} pixels, {side} tokens in a row, and it knows "
            f"positions up to {longest}; use davae train-dit, which trains the same upgrade and writes no report"
        )


def has_report(folder: Path) -> bool:
    """Return whether a run's `report.json` has its figures, and name a damaged one in the log."""
    try:
        return bool(read_report(folder))
    except ModelError as error:
        logger.warning("%s; here it is made again", error)
        return False


def resize_to(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BILINEAR)


def default_prompts(run: Upgrade) -> list[str]:
    """Return the recipe's prompts, else the model's classes, else captions of training images."""
    if run.recipe.sampling.prompts:
        return list(run.recipe.sampling.prompts)
    if goes_by_class(run.base_pipeline):
        return example_classes(run.base_pipeline, 8)
    images = run.data.for_cache()
    return [images[(i, -1)]["caption"] for i in spread_indices(len(images), 8)]


def write_run_report(run: Upgrade, observer: Observer) -> Path:
    """Sample, reconstruct, time, plot, and write the page of a finished run."""
    recipe = run.recipe
    upgraded = load_pipeline(str(run.out / "pipeline"), report_precision(recipe))
    turn = OneOnDevice(run.accelerator.device)
    shipped_pipeline = comparable_upgrade(run)
    prompts = default_prompts(run)
    samples = sample_columns(run, turn, upgraded, shipped_pipeline, prompts)
    observer(Progress("report", 1, 4, 0.0))
    reconstructed, quality = reconstruction_section(run, turn, upgraded, shipped_pipeline)
    observer(Progress("report", 2, 4, 0.0))
    speed = speed_section(run, turn, upgraded, prompts[0])
    observer(Progress("report", 3, 4, 0.0))
    records = read_metrics(run.out / "metrics.jsonl")
    sources = {recipe.stage1_data.source, recipe.stage2_data.source}
    openmoji = "openmoji" in sources or recipe.base.model == "micro"
    content = ReportContent(
        title=f"{recipe.name}: {recipe.base.resolution} to {recipe.resolution} pixels at the same tokens",
        lead=lead(run, shipped_pipeline is not None),
        facts=facts(run, upgraded),
        command=f"davae upgrade {run.out / 'recipe.yaml'} --out NEW_FOLDER",
        prompts=prompts,
        samples=samples,
        reconstructions=reconstructed,
        speed=speed,
        quality=quality,
        curves={
            "Stage 1: the detail-aligned VAE": loss_curves(records, "stage1"),
            **({} if recipe.stage1.polish is None else {POLISH_TITLE: loss_curves(records, POLISH)}),
            "Stage 2: error of base and detail channels (Fig. S3), and the weight w(n) of Eq. 12": loss_curves(
                records, "stage2"
            ),
        },
        skipped=sorted(set(run.skipped)),
        credits=CREDIT if openmoji else "",
        reconstruction_images=shown_data(run).shown_from,
        phases=read_times(run.out),
    )
    page = write_report(content, run.out)
    observer(Progress("report", 4, 4, 0.0))
    return page


def lead(run: Upgrade, shipped: bool) -> str:
    recipe, polish = run.recipe, ""
    if recipe.stage1.polish is not None:
        polish = (
            f"the polish of its decoder {recipe.stage1.polish.max_steps} of {recipe.stage1.polishing.batch_size}, "
        )
    text = (
        f"{run.base.shapes.transformer_class} of {recipe.base.name}: {run.layout.detail_channels} detail channels joined its "
        f"{run.layout.base_channels} base channels. Stage 1 ran {recipe.stage1.max_steps} steps of "
        f"{recipe.stage1.batch_size}, {polish}stage 2 {recipe.stage2.max_steps} steps of {recipe.stage2.batch_size}, here."
    )
    if shipped:
        text += (
            f" 'This run' is the model that this run trained. 'Shipped' is {recipe.base.name}-upgraded, another upgrade of "
            "the same base, which comes with davae: compare with it, but it is not this run's result."
        )
    return text


def comparable_upgrade(run: Upgrade) -> Any:
    """Return the shipped upgrade of the run's base, None without one that draws the same size."""
    folder = shipped_upgrade(run.recipe.base.name)
    if folder is None or not folder.is_dir():
        return None
    pipeline = load_upgraded(run.base_pipeline, folder)
    own = run.recipe.resolution, run.layout.scale
    return pipeline if (pipeline.vae.config["sample_size"], pipeline.vae.layout.scale) == own else None


def shown_data(run: Upgrade) -> OpenedData:
    """Return the images of which the report shows reconstructions."""
    return run.opened if run.init is not None else run.data.stage1


def facts(run: Upgrade, upgraded: Any) -> list[tuple[str, str]]:
    recipe, layout = run.recipe, run.layout
    side = recipe.base.resolution // run.base.shapes.vae_factor
    tokens = (side // run.base.shapes.patch_size) ** 2
    return [
        ("pixels", f"{recipe.base.resolution}² → {recipe.resolution}²"),
        ("image tokens", f"{tokens} (native: {tokens * recipe.scale**2})"),
        ("latent", f"{side}×{side}×({layout.base_channels} + {layout.detail_channels})"),
        ("transformer", f"{count(denoiser(upgraded).parameters()) / 1e6:.2f} M parameters"),
        ("detail VAE", f"{count(upgraded.vae.parameters()) / 1e6:.2f} M parameters"),
        ("training pictures", training_images(run)),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"),
    ]


def training_images(run: Upgrade) -> str:
    """Return how many images trained, by stage where the stages have images of their own."""
    if run.init is not None or run.recipe.stage1_data == run.recipe.stage2_data:
        return str(len(run.train))
    return f"{len(run.data.stage1.train)} in stage 1, {len(run.train)} in stage 2"


def halving_of(run: Upgrade, what: str, vae: Any) -> Halving:
    """Return batches of `report.batch_size`, else of the memory plan, halved without memory."""
    recipe = run.recipe

    def one() -> int:
        return coding_bytes(vae, recipe.resolution, report_precision(recipe))

    size = images_at_a_time(recipe.report.batch_size, AT_A_TIME, run.accelerator.device, one)
    return Halving(f"report, {what}", size)


def sample_columns(run: Upgrade, turn: OneOnDevice, upgraded: Any, shipped: Any, prompts: list[str]) -> list[Column]:
    """Return a column of samples of each model, one model at a time on the device."""
    recipe = run.recipe
    high, low = recipe.resolution, recipe.base.resolution
    sampling = recipe.sampling
    options = SamplingOptions(sampling.steps, sampling.guidance_scale, sampling.seed)
    halving = halving_of(run, "samples", upgraded.vae)

    def drawn(pipeline: Any, pixels: int) -> list[Any]:
        turn(pipeline)

        def draw(first: int, last: int) -> list[Any]:
            part = prompts[first:last]
            own = replace(options, resolution=pixels, batch_size=len(part))
            return generate(pipeline, part, own, first=first)

        return [image for part in halving.parts(draw, len(prompts)) for image in part]

    base = [resize_to(image, high) for image in drawn(run.base_pipeline, low)]
    columns = [
        Column("base, enlarged", base, f"{low} px, bilinear to {high}"),
        Column(
            "base, native",
            drawn(run.base_pipeline, high),
            f"{high} px, {recipe.scale**2}x the tokens",
        ),
        Column(
            "this run",
            drawn(upgraded, high),
            f"{high} px, same tokens as {low}",
            "own",
        ),
    ]
    if shipped is not None:
        columns.append(
            Column("shipped", drawn(shipped, high), f"{recipe.base.name}-upgraded, not this run", "shipped")
        )
    return columns


def reconstruction_section(
    run: Upgrade, turn: OneOnDevice, upgraded: Any, shipped: Any
) -> tuple[list[Column], list[dict[str, Any]]]:
    """Return reconstructions of held-out images, else training images, and their scores."""
    opened = shown_data(run)
    dataset = opened.squares(opened.shown(run.recipe.report.holdout_pictures), run.recipe.run.seed)
    images = torch.stack([dataset[(i, -1)]["image"] for i in range(len(dataset))])
    methods = reconstructions(upgraded.vae, run.base_pipeline.vae)
    if shipped is not None:
        methods[SHIPPED_ROW] = reconstructions(shipped.vae, run.base_pipeline.vae)["full"]
    autoencoders = {"base + bicubic": run.base_pipeline.vae, SHIPPED_ROW: getattr(shipped, "vae", None)}
    if run.recipe.stage1.polish is not None:
        autoencoders[BEFORE_POLISH] = autoencoder_like(upgraded.vae, run.first / VAE_FOLDER)
        methods[BEFORE_POLISH] = reconstructions(autoencoders[BEFORE_POLISH], run.base_pipeline.vae)["full"]
    perceptual = Lite0Distance()
    columns = [Column("original", to_images(images[:SHOWN_RECONSTRUCTIONS]))]
    rows: list[dict[str, Any]] = []
    halving = halving_of(run, "reconstructions", upgraded.vae)
    for name, method in methods.items():
        turn(autoencoders.get(name, upgraded.vae))
        reconstruct = partial(halving, method)
        roles: dict[str, Any] = {"full": "own", SHIPPED_ROW: "shipped"}
        shown = to_images(reconstruct(images[:SHOWN_RECONSTRUCTIONS]))
        columns.append(Column(name, shown, role=roles.get(name, "")))
        scores = score_reconstructions(images.split(AT_A_TIME), reconstruct, {"lite0": perceptual})
        rows.append({"name": name, **scores.as_dict(), "model": "shipped" if name == SHIPPED_ROW else "this run"})
    best = best_rows(rows)["psnr"]
    return columns, [{**row, "best": place in best} for place, row in enumerate(rows)]


def speed_section(run: Upgrade, turn: OneOnDevice, upgraded: Any, prompt: str) -> list[dict[str, Any]]:
    recipe = run.recipe
    high, low = recipe.resolution, recipe.base.resolution
    rows: list[Timing] = time_pipelines(
        [
            (f"base at {low}, enlarged", run.base_pipeline, low, partial(resize_to, size=high)),
            (f"base native at {high}", run.base_pipeline, high, lambda image: image),
            ("upgraded", upgraded, high, lambda image: image),
        ],
        prompt,
        steps=recipe.sampling.steps,
        guidance_scale=recipe.sampling.guidance_scale,
        repeats=recipe.report.timing_repeats,
        turn=turn,
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
