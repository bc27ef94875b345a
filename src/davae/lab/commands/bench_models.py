"""`davae bench tokens | whole | vae | stage1 | stage2 | sample | throughput | guidance`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from davae.commands.options import Compile, Json, Offload, Overrides, Precision
from davae.lab.commands.bench import bench_app, show, upgrade_recipe

Repeats = Annotated[int, typer.Option(min=1, help="Timed repeats; rivals take turns.")]
Steps = Annotated[int, typer.Option(min=1, help="Timed steps a repeat.")]
Helpers = Annotated[
    list[str] | None,
    typer.Option(
        "--helper",
        help="Measure with first-block-cache, faster-cache, compiled, cuda-graphs, int8 or fp8 too, or several as "
        "int8+compiled; may be repeated.",
    ),
]
Tile = Annotated[int, typer.Option(help="Side of a tile, pixels.")]


@bench_app.command()
def tokens(
    model: Annotated[str, typer.Argument(help="A preset (`davae inspect` lists them), a folder or a hub id.")],
    resolution: Annotated[int, typer.Option(help="Pixels of the image.")] = 1024,
    scale: Annotated[int, typer.Option(min=2, help="s, a power of two.")] = 2,
    detail_channels: Annotated[int | None, typer.Option(help="D; C unless given.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the true width, random weights.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images in a pass; guidance makes two of each.")] = 1,
    repeats: Repeats = 5,
    helper: Helpers = None,
    dtype: Precision = "float32",
    json: Json = None,
) -> None:
    """A transformer pass, native against upgraded, beside the bound from FLOPs.

    `davae bench tokens sd35-medium --resolution 1024 --blocks 2 --helper int8+compiled`
    """
    from davae.errors import ModelError
    from davae.lab.bench.helpers import check_helpers
    from davae.lab.bench.tokens import bench_tokens
    from davae.pretrained.placement import Placement
    from davae.pretrained.shapes import read_shapes
    from davae.zoo import resolve

    check_helpers(helper or [], passes=1)
    shapes = read_shapes(resolve(model))
    try:
        figures = bench_tokens(
            shapes,
            resolution=resolution,
            scale=scale,
            detail_channels=detail_channels or shapes.channels,
            blocks=blocks,
            repeats=repeats,
            batch=batch,
            helpers=helper or [],
            dtype=Placement(dtype).dtype,
        )
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    show(json, {"model": model, **figures})


@bench_app.command("whole")
def whole_image(
    model: Annotated[str, typer.Argument(help="A preset (`davae inspect` lists them), a folder or a hub id.")],
    resolution: Annotated[int, typer.Option(help="Pixels of the image.")] = 1024,
    scale: Annotated[int, typer.Option(min=2, help="s, a power of two.")] = 2,
    detail_channels: Annotated[int | None, typer.Option(help="D; C unless given.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks that run; their time is scaled to all by FLOPs.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 28,
    guided: Annotated[bool, typer.Option(help="Two passes a step.")] = True,
    repeats: Repeats = 2,
    dtype: Precision = "float32",
    json: Json = None,
) -> None:
    """A whole image at the true widths, part by part: text encoders, every step, decoding. Random weights.

    `davae bench whole sd35-medium --resolution 1024 --steps 28`
    """
    from davae.lab.bench.whole import bench_whole
    from davae.pretrained.placement import Placement
    from davae.zoo import resolve

    figures = bench_whole(
        resolve(model),
        resolution=resolution,
        scale=scale,
        detail_channels=detail_channels,
        blocks=blocks,
        steps=steps,
        guided=guided,
        repeats=repeats,
        dtype=Placement(dtype).dtype,
    )
    show(json, {**figures, "model": model})


@bench_app.command()
def vae(
    model: Annotated[str, typer.Argument(help="An autoencoder's folder, a pipeline's, or `micro-upgraded`.")],
    resolution: Annotated[int, typer.Option(help="Pixels of the image.")] = 1024,
    tile: Tile = 512,
    only: Annotated[Literal["encode", "decode"] | None, typer.Option(help="One way; both by default.")] = None,
    repeats: Repeats = 3,
    dtype: Precision = "float32",
    json: Json = None,
) -> None:
    """Encoding and decoding, whole and tiled: time, peak memory, difference.

    `davae bench vae micro-upgraded --resolution 2048 --tile 512`
    """
    from davae.errors import ModelError
    from davae.lab.bench.vae import WAYS, bench_vae
    from davae.pretrained.placement import Placement
    from davae.zoo import SHIPPED, resolve, resolve_upgrade

    folder = str(resolve_upgrade(model)) if model in SHIPPED else resolve(model)
    try:
        figures = bench_vae(
            folder,
            resolution=resolution,
            tile=tile,
            repeats=repeats,
            ways=WAYS if only is None else [only],
            dtype=Placement(dtype).dtype,
        )
    except ValueError as error:
        raise ModelError(f"{model}: {error}") from error
    show(json, {**figures, "vae": model})


@bench_app.command("stage1")
def stage1_step(
    recipe: Annotated[str, typer.Argument(help="An upgrade recipe.")] = "micro",
    steps: Steps = 4,
    repeats: Repeats = 2,
    set: Overrides = None,
    json: Json = None,
) -> None:
    """A step of the detail VAE with all of the paper's losses, against a plain implementation of them.

    `davae bench stage1 micro --set stage1.batch_size=4`
    """
    from davae.lab.bench.stages import bench_stage1

    show(json, bench_stage1(upgrade_recipe(recipe, set or []), steps=steps, repeats=repeats))


@bench_app.command("stage2")
def stage2_step(
    recipe: Annotated[str, typer.Argument(help="An upgrade recipe.")] = "micro",
    steps: Steps = 4,
    repeats: Repeats = 2,
    set: Overrides = None,
    json: Json = None,
) -> None:
    """A step of the transformer from the cache, against a plain implementation.

    `davae bench stage2 micro`
    """
    from davae.lab.bench.stages import bench_stage2

    show(json, bench_stage2(upgrade_recipe(recipe, set or []), steps=steps, repeats=repeats))


@bench_app.command("sample")
def whole_pipelines(
    base: Annotated[str, typer.Argument(help="`micro`, a folder or a hub id.")] = "micro",
    upgraded: Annotated[
        str, typer.Argument(help="Its upgrade: a run or pipeline folder, or `micro-upgraded`.")
    ] = "micro-upgraded",
    prompt: Annotated[str, typer.Option(help="A prompt, or a class.")] = "a red rose",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns it off.")] = 4.0,
    repeats: Repeats = 3,
    helper: Helpers = None,
    dtype: Precision = "float32",
    offload: Offload = "off",
    json: Json = None,
) -> None:
    """Whole images: native against upgraded, and what multiplies with the token saving.

    `davae bench sample micro micro-upgraded --helper first-block-cache --helper compiled`
    """
    from davae.lab.bench.helpers import check_helpers
    from davae.lab.bench.sampling import bench_sample
    from davae.pretrained.placement import Placement
    from davae.pretrained.shapes import default_resolution
    from davae.sample.open import SamplingOptions, open_model

    check_helpers(helper or [])
    placement = Placement(dtype, offload)
    native, better = open_model(base, placement)[0], open_model(upgraded, placement)[0]
    figures = bench_sample(
        native,
        better,
        SamplingOptions(steps, guidance, resolution=default_resolution(better)),
        prompt=prompt,
        repeats=repeats,
        helpers=["plain", *(helper or [])],
    )
    show(json, {"base": base, "upgraded": upgraded, **figures})


@bench_app.command()
def throughput(
    model: Annotated[
        str,
        typer.Argument(help="A run or pipeline folder, `micro`, `clothing`, `NAME-upgraded`, or a hub id."),
    ],
    prompt: Annotated[str, typer.Option(help="A prompt, or a class.")] = "a red rose",
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own size by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at a time.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns it off.")] = 2.5,
    repeats: Repeats = 3,
    dtype: Precision = "bfloat16",
    compile: Compile = "off",
    json: Json = None,
) -> None:
    """Images a second of one pipeline in batches of ten in bfloat16, as the paper's Tab. 3 counts them.

    `davae bench throughput runs/sd35-medium-1k --steps 30 --guidance 2.5`
    """
    from davae.lab.bench.throughput import bench_throughput
    from davae.pretrained.placement import Placement
    from davae.pretrained.shapes import default_resolution
    from davae.sample.open import check_class_prompts, open_model

    pipeline, _ = open_model(model, Placement(dtype, compile=compile))
    check_class_prompts(pipeline, [prompt])
    size = resolution or default_resolution(pipeline)
    figures = bench_throughput(
        pipeline, prompt, resolution=size, batch=batch, steps=steps, guidance=guidance, repeats=repeats
    )
    show(json, {"model": model, **figures})


@bench_app.command()
def guidance(
    hidden_size: Annotated[int, typer.Option(help="Width of the transformer.")] = 384,
    depth: Annotated[int, typer.Option(help="Layers of the transformer.")] = 6,
    grid: Annotated[int, typer.Option(help="Side of the latent.")] = 16,
    channels: Annotated[int, typer.Option(help="Channels of the latent.")] = 32,
    num_steps: Annotated[int, typer.Option(min=2, help="Grid points.")] = 250,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    repeats: Repeats = 2,
    json: Json = None,
) -> None:
    """Guided LightningDiT sampling within the paper's interval, against computing both halves in every step.

    `davae bench guidance --num-steps 250`
    """
    from davae.lab.bench.sampling import bench_guidance

    figures = bench_guidance(
        hidden_size=hidden_size,
        depth=depth,
        grid=grid,
        channels=channels,
        num_steps=num_steps,
        batch=batch,
        repeats=repeats,
    )
    show(json, figures)
