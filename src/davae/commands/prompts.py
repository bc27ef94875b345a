"""`davae evaluate prompts`, `geneval` and `geneval-score`: how well pictures follow their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.commands.options import (
    GUIDANCE,
    STEPS,
    BatchSize,
    Compile,
    Guidance,
    Json,
    Offload,
    Precision,
    Seed,
    Steps,
    write_json,
)

Pipeline = Annotated[str, typer.Option(help="A run or pipeline folder, `micro`, `micro-upgraded`, or a hub id.")]
Folder = Annotated[Path, typer.Option(help="Folder for the pictures; those already there are kept.")]
Resolution = Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own size by default.")]
ClipModel = Annotated[str | None, typer.Option(help="A CLIP model of transformers: folder or hub id.")]


def prompts(
    pipeline: Pipeline,
    prompts: Annotated[
        Path,
        typer.Option(help=".txt, PartiPrompts .tsv, MJHQ-30K meta_data.json, DiffusionDB .parquet or .json, .jsonl"),
    ],
    out: Folder,
    num: Annotated[int | None, typer.Option(min=1, help="Only this number of prompts, from the first on.")] = None,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    resolution: Resolution = None,
    seed: Seed = 0,
    clip: ClipModel = None,
    dtype: Precision = "float32",
    batch_size: BatchSize = 16,
    offload: Offload = "off",
    compile: Compile = "off",
    json: Json = None,
) -> None:
    """A picture a prompt, and their CLIP score with `--clip`. FID of the folder: `davae evaluate pictures`. Example:

    `davae evaluate prompts --pipeline runs/sd35 --prompts MJHQ-30K/meta_data.json --out mjhq --clip clip-vit-large-patch14`
    """
    from davae.console import console, progress_display
    from davae.evaluate.prompts import evaluate_prompts
    from davae.pretrained.placement import Placement
    from davae.train.loop import Progress

    with progress_display() as observer:
        figures = evaluate_prompts(
            pipeline,
            prompts,
            out,
            num=num,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
            seed=seed,
            clip=clip,
            batch_size=batch_size,
            placement=Placement(dtype, offload, compile),
            on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        )
    write_json(json, figures)
    console.print_json(data=figures)


def geneval(
    pipeline: Pipeline,
    prompts: Annotated[Path, typer.Option(help="GenEval's evaluation_metadata.jsonl.")],
    out: Folder,
    num: Annotated[int, typer.Option(min=1, help="Pictures a prompt; 4 in published tables.")] = 4,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    resolution: Resolution = None,
    seed: Seed = 0,
    detector: Annotated[
        str | None, typer.Option(help="A COCO object detector of transformers, to judge the pictures here.")
    ] = None,
    clip: ClipModel = None,
    dtype: Precision = "float32",
    batch_size: BatchSize = 16,
    offload: Offload = "off",
    compile: Compile = "off",
    json: Json = None,
) -> None:
    """GenEval's folder layout, for the official evaluation; judged here too with `--detector` and `--clip`.

    The rules are GenEval's, the detector is another than the official Mask2Former: compare such scores only with each other.

    `davae evaluate geneval --pipeline runs/sd35 --prompts evaluation_metadata.jsonl --out geneval`
    """
    from davae.console import console, progress_display
    from davae.evaluate.prompts import evaluate_geneval
    from davae.pretrained.placement import Placement
    from davae.train.loop import Progress

    with progress_display() as observer:
        figures = evaluate_geneval(
            pipeline,
            prompts,
            out,
            num=num,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
            seed=seed,
            detector=detector,
            clip=clip,
            batch_size=batch_size,
            placement=Placement(dtype, offload, compile),
            on_batch=lambda done, total: observer(Progress("sampling", done, total, 0.0)),
        )
    write_json(json, figures)
    console.print_json(data=figures)


def geneval_score(
    results: Annotated[Path, typer.Argument(help="results.jsonl of the official evaluation, or of ours.")],
    json: Json = None,
) -> None:
    """Scores by task and overall, with the images behind each. Example: `davae evaluate geneval-score results.jsonl`"""
    from davae.console import console
    from davae.evaluate.geneval import coverage, read_results, scores

    records = read_results(results)
    figures = {**scores(records), **coverage(records)}
    write_json(json, figures)
    console.print_json(data=figures)
