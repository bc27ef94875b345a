"""`davae evaluate`: figures of a model on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.enlarging import enlarging
from davae.commands.options import (
    GUIDANCE,
    STEPS,
    BatchSize,
    CaptionColumn,
    CaptionKey,
    Compile,
    Enlarge,
    Guidance,
    ImageColumn,
    Json,
    LabelColumn,
    LabelKey,
    Offload,
    Options,
    Precision,
    Seed,
    Steps,
    chosen_data,
    sampling_options,
    summary_path,
)
from davae.commands.progress import counted_progress, show_figures, show_place
from davae.commands.prompts import geneval, geneval_score, prompts
from davae.commands.verbs import Verbs

FeatureNetwork = Annotated[
    Literal["lite0", "inception"],
    typer.Option(
        metavar="NAME",
        help="lite0 or inception: lite0 works offline and is never called FID; inception gives FID, KID and IS.",
    ),
]
OptionalFeatures = Annotated[
    Literal["lite0", "inception"] | None,
    typer.Option(metavar="NAME", help="lite0 or inception: features for the distance between the two sets (rFID)."),
]
PatchSize = Annotated[
    int,
    typer.Option(
        min=0, max=4096, help="Side of the crops of the patch distance, in pixels of the final size; 0 leaves it out."
    ),
]
SpectrumFile = Annotated[Path | None, typer.Option(help="PNG of the power spectra of both sets.")]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Inception weights of torch-fidelity, without a network.")
]
HeldIn = Annotated[
    float,
    typer.Option(
        min=0.0, max=0.99, metavar="SHARE", help="Only the training side of a split that holds out this share."
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep samples before enlarging and measurements of the real images there, for further calls.",
    ),
]
CompareAt = Annotated[
    int | None, typer.Option(help="Pixels to compare at; samples of another size are brought to it.")
]
Upscale = Annotated[
    str,
    typer.Option(
        help="How: bilinear, bicubic, lanczos, weights of a super-resolution network (spandrel), an upgraded model, "
        "or a command with {input} and {output} folders."
    ),
]

evaluate_app = Verbs(no_args_is_help=True, help="Measure a model on images.")
evaluate_app.command()(prompts)
evaluate_app.command()(enlarging)
evaluate_app.command()(geneval)
evaluate_app.command("geneval-score")(geneval_score)


@evaluate_app.command()
def reconstruction(
    vae: Annotated[str, typer.Option(help="A DetailVAE folder, a run folder, or a diffusers autoencoder folder.")],
    data: Annotated[str, typer.Option(help="Images, as `davae upgrade --data` takes them.")],
    resolution: Annotated[int | None, typer.Option(help="Pixels; the autoencoder's own by default.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Images to use, at most.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.99, metavar="SHARE", help="Only this held-out share; 0 takes all.")
    ] = 0.0,
    lpips: Annotated[Literal["alex", "vgg"] | None, typer.Option(help="LPIPS too, on this network.")] = None,
    lpips_weights: Annotated[
        str | None, typer.Option(help="Its safetensors (trunk and heads), where torchvision cannot download.")
    ] = None,
    features: OptionalFeatures = None,
    feature_weights: Weights = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time; by default as many as the memory plan allows, up to 16."),
    ] = None,
    dtype: Precision = "float32",
    image_column: ImageColumn = None,
    enlarge: Enlarge = None,
    set: Options = None,
    json: Json = None,
) -> None:
    """PSNR, SSIM, perceptual distances, and rFID with `--features`. `accelerate launch` shares the work.

    `davae evaluate reconstruction --vae runs/micro/vae --data openmoji --held-out 0.1`
    """
    from davae.evaluate.reconstruction import evaluate_reconstruction

    figures = evaluate_reconstruction(
        vae,
        chosen_data(data, set, locals()),
        resolution,
        num,
        held_out,
        summary=summary_path(json),
        lpips=lpips,
        lpips_weights=lpips_weights,
        features=features,
        feature_weights=feature_weights,
        batch_size=batch_size,
        precision=dtype,
    )
    show_figures(json, figures)


@evaluate_app.command()
def generation(
    pipeline: Annotated[
        str, typer.Option(help="A run or pipeline folder, `micro`, `clothing`, `NAME-upgraded`, or a hub id.")
    ],
    data: Annotated[str, typer.Option(help="Real images with captions.")],
    num: Annotated[int, typer.Option(min=2, help="Generated images.")] = 1000,
    resolution: Annotated[int | None, typer.Option(help="Pixels to generate; the pipeline's own by default.")] = None,
    compare_at: CompareAt = None,
    upscale: Upscale = "bilinear",
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    seed: Seed = 0,
    held_in: HeldIn = 0.0,
    features: FeatureNetwork = "lite0",
    feature_weights: Weights = None,
    dtype: Precision = "float32",
    offload: Offload = "off",
    compile: Compile = "off",
    batch_size: BatchSize = 32,
    patch_size: PatchSize = 64,
    spectrum: SpectrumFile = None,
    keep: Keep = None,
    caption_key: CaptionKey = None,
    caption_column: CaptionColumn = None,
    label_key: LabelKey = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    enlarge: Enlarge = None,
    set: Options = None,
    json: Json = None,
) -> None:
    """Frechet and kernel distance, precision and recall against real images, prompted by their captions or classes.

    `davae evaluate generation --pipeline runs/micro --data openmoji --num 1000`

    The base, enlarged: `davae evaluate generation --pipeline micro --compare-at 128 --upscale lanczos --data openmoji`
    """
    from davae.evaluate.generation import evaluate_generation

    with counted_progress("sampling") as on_batch:
        figures = evaluate_generation(
            pipeline,
            chosen_data(data, set, locals()),
            sampling_options(locals()),
            num=num,
            compare_at=compare_at,
            held_in=held_in,
            features=features,
            feature_weights=feature_weights,
            on_batch=on_batch,
            upscale=upscale,
            patch_size=patch_size,
            spectrum=spectrum,
            summary=summary_path(json),
            keep=keep,
        )
    show_figures(json, figures)


@evaluate_app.command()
def pictures(
    generated: Annotated[str, typer.Option(help="Images: a folder, a .tar, an .npz of ADM.")],
    data: Annotated[str, typer.Option(help="Real images, likewise.")],
    resolution: Annotated[int, typer.Option(help="Pixels to compare at; larger images are reduced and cropped.")],
    num: Annotated[int | None, typer.Option(min=4, help="Images of each, at most.")] = None,
    features: FeatureNetwork = "inception",
    feature_weights: Weights = None,
    patch_size: PatchSize = 64,
    spectrum: SpectrumFile = None,
    caption_key: CaptionKey = None,
    caption_column: CaptionColumn = None,
    label_key: LabelKey = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    enlarge: Enlarge = None,
    set: Options = None,
    json: Json = None,
) -> None:
    """Two sets of images on disk: Frechet and kernel distance, precision, recall, Inception score.

    `davae evaluate pictures --generated samples.npz --data reference.npz --resolution 256`
    """
    from davae.evaluate.generation import evaluate_pictures

    figures = evaluate_pictures(
        generated,
        chosen_data(data, set, locals()),
        resolution,
        num=num,
        features=features,
        feature_weights=feature_weights,
        patch_size=patch_size,
        spectrum=spectrum,
        summary=summary_path(json),
    )
    show_figures(json, figures)


@evaluate_app.command()
def samples(
    pipeline: Annotated[str, typer.Option(help="A class-conditional run or pipeline folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The .npz to write; its parts lie next to it until you remove them.")],
    num: Annotated[int, typer.Option(min=1, help="Images: 50000 or 10000 in published tables.")] = 50000,
    labels: Annotated[
        Literal["balanced", "random"], typer.Option(help="Equal numbers a class, or drawn by seed.")
    ] = ("balanced"),
    steps: Annotated[int, typer.Option(min=1, help="Updates of the ODE.")] = 249,
    guidance: Annotated[
        float,
        typer.Option(min=0.0, help="Guidance scale; the ImageNet protocol's by default."),
    ] = 4.0,
    seed: Seed = 0,
    batch_size: BatchSize = 50,
    dtype: Precision = "float32",
    offload: Offload = "off",
    compile: Compile = "off",
) -> None:
    """Images in the ADM format (`arr_0` uint8) for the usual FID suites. Resumes; `accelerate launch` shares the work.

    `davae evaluate samples --pipeline lightningdit-xl --out samples.npz --num 50000`
    """
    from davae.evaluate.sample_file import write_sample_file

    with counted_progress("sampling") as on_part:
        whole = write_sample_file(pipeline, out, sampling_options(locals()), num=num, labels=labels, on_part=on_part)
    show_place(out if whole else f"{out}: other processes are still drawing their parts")
