"""`davae evaluate prompts`, `geneval`, `geneval-score`: agreement of images with prompts."""

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
    sampling_options,
)
from davae.commands.progress import counted_progress, show_figures

Pipeline = Annotated[
    str, typer.Option(help="A run or pipeline folder, `micro`, `clothing`, `NAME-upgraded`, or a hub id.")
]
Folder = Annotated[Path, typer.Option(help="Folder for the images; those already there are kept.")]
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
    """An image a prompt, and their CLIP score with `--clip`. FID of the folder: `davae evaluate pictures`.

    `davae evaluate prompts --pipeline runs/sd35 --prompts MJHQ-30K/meta_data.json --out mjhq --clip clip-vit-large-patch14`
    """
    from davae.evaluate.prompts import evaluate_prompts

    with counted_progress("sampling") as on_batch:
        figures = evaluate_prompts(
            pipeline, prompts, out, sampling_options(locals()), num=num, clip=clip, on_batch=on_batch
        )
    show_figures(json, figures)


def geneval(
    pipeline: Pipeline,
    prompts: Annotated[Path, typer.Option(help="GenEval's prompts: its file of metadata, a .jsonl.")],
    out: Folder,
    num: Annotated[int, typer.Option(min=1, help="Images a prompt; 4 in published tables.")] = 4,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    resolution: Resolution = None,
    seed: Seed = 0,
    detector: Annotated[
        str | None, typer.Option(help="A COCO object detector of transformers, to judge the images here.")
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
    from davae.evaluate.prompts import evaluate_geneval

    options = sampling_options(locals())
    with counted_progress("sampling") as on_batch:
        figures = evaluate_geneval(
            pipeline, prompts, out, options, num=num, detector=detector, clip=clip, on_batch=on_batch
        )
    show_figures(json, figures)


def geneval_score(
    results: Annotated[Path, typer.Argument(help="results.jsonl of the official evaluation, or of ours.")],
    json: Json = None,
) -> None:
    """Scores by task and overall, with the images behind each.

    `davae evaluate geneval-score results.jsonl`
    """
    from davae.evaluate.geneval import geneval_figures, read_results

    show_figures(json, geneval_figures(read_results(results)))
