"""`davae inspect`: what an upgrade would bring and take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from davae.commands.options import Json, write_json
from davae.zoo import SHIPPED

GIB = 2**30
PHASES = (
    "Phases: 500,000 images, the steps and batches of Tab. S1, text embeddings stored in the cache. A recipe with "
    "`cache.text: step` needs less disk; its --dry-run has the figures."
)


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A hub id, a diffusers folder, or a preset; without one, lists the presets.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels of the upgraded image; by default `scale` times the model's own.")
    ] = None,
    scale: Annotated[int, typer.Option(min=2, help="s, a power of two.")] = 2,
    detail_channels: Annotated[int | None, typer.Option(min=1, help="D; by default as many as C.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps of the whole image; by default the pipeline's.")
    ] = None,
    json: Json = None,
) -> None:
    """What an upgrade would bring and take: tokens, FLOPs, parameters, memory, phases. Reads configs, needs no weights.

    `davae inspect sd35-medium --resolution 1024`

    `davae inspect path/to/a/diffusers/folder --json figures.json`
    """
    if model is None:
        _list(json)
        return
    if model in SHIPPED:
        base = SHIPPED[model]
        typer.echo(
            f"{model} is {base} with its upgrade applied; the figures are those of upgrading {base}.", err=True
        )
        model = base
    from davae.console import console, parts_display, quiet_model_libraries, show_phases
    from davae.plan.counted import inspected_figures

    with parts_display(f"inspecting {model}") as show:

        def watch(part: str) -> None:
            show(part)
            quiet_model_libraries()

        values = inspected_figures(model, resolution, scale, detail_channels, steps, watch)
    write_json(json, values)
    _show(values)
    if "phases" in values:
        show_phases(values, ", one image a pass, prompt embeddings stored")
        console.print(PHASES, markup=False, highlight=False)
    for note in values["notes"]:
        console.print(f"Note: {note}.", markup=False)


def _list(json: Path | None) -> None:
    from rich.console import Console

    from davae.zoo.presets import presets

    write_json(json, {name: {"title": preset.title, "hub": preset.hub} for name, preset in presets().items()})
    for name, preset in presets().items():
        Console().print(f"{name:<16} {preset.title} ({preset.hub or 'no hub id'})", markup=False, highlight=False)


def _show(f: dict[str, Any]) -> None:
    """Print the figures as tables."""
    _show_tokens(f)
    _show_flops(f)
    _show_sizes(f)


def _show_tokens(f: dict[str, Any]) -> None:
    from davae.console import table

    side, base, detail = int(f["latent_side"]), f["base_channels"], f["detail_channels"]
    native = side * f["scale"]
    table(
        f"{f['model']} at {f['resolution']} px",
        ["", "native", "upgraded"],
        [
            ["latent (channels, height, width)", f"({base}, {native}, {native})",
             f"({base}+{detail}={base + detail}, {side}, {side})"],
            ["pixels per latent position", f["vae_factor"], int(f["vae_factor"]) * f["scale"]],
            ["latent positions per token", *[f"{f['patch_size']}x{f['patch_size']}"] * 2],
            ["image tokens", f["native_tokens"], f["upgraded_tokens"]],
        ],
    )  # fmt: skip


def _show_flops(f: dict[str, Any]) -> None:
    from davae.console import table

    unit, one = ("T", 1e12) if f["upgraded_vae_decode_flops"] > 1e11 else ("G", 1e9)

    def shown(flops: float) -> str:
        return f"{flops / one:.3f}"

    rows = []
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if f"{part}_flops" in f:
            rows.append([f"{part}, {f[part + '_tokens']} tokens", *[shown(f[f"{part}_flops"])] * 2, ""])
    if "bound" in f:
        for label, kind in (("transformer, a pass", ""), ("  attention", "_attention"), ("  linear", "_linear"),
                            ("  convolution", "_convolution")):  # fmt: skip
            old, new = f[f"native{kind}_flops"], f[f"upgraded{kind}_flops"]
            if old:
                rows.append([label, shown(old), shown(new), f"{old / new:.2f}x"])
    for work in ("encode", "decode"):
        old, new = f[f"native_vae_{work}_flops"], f[f"upgraded_vae_{work}_flops"]
        rows.append([f"autoencoder, {work}", shown(old), shown(new), f"{old / new:.2f}x"])
    if "bound" in f:
        guidance = "with guidance" if f["passes_per_step"] == 2 else "one pass each"
        old, new = f["native_picture_flops"], f["upgraded_picture_flops"]
        rows.append([f"whole image, {f['steps']} steps {guidance}", shown(old), shown(new), f"{old / new:.2f}x"])
    table(
        f"{unit}FLOPs of one image, a ratio of work and not a measured speed",
        ["", "native", "upgraded", "FLOPs ratio"],
        rows,
    )


def _show_sizes(f: dict[str, Any]) -> None:
    """Print parameters, and memory of training and of drawing."""
    from davae.console import table

    names = [key for key in f if key.endswith("_parameters") or key.startswith("trained_parameters")]
    table("Parameters, M", ["", ""], [[key.replace("_", " "), f"{f[key] / 1e6:.1f}"] for key in names])
    stages = [key.removesuffix("_peak_bytes") for key in f if key.startswith("stage") and key.endswith("_peak_bytes")]
    kinds = ("weights", "gradients", "optimizer", "ema", "activations", "peak")
    table(
        "GiB of a training step of one image, bfloat16 over float32 weights",
        ["", *kinds],
        [[s.replace("_", " "), *[f"{f[f'{s}_{kind}_bytes'] / GIB:.2f}" for kind in kinds]] for s in stages],
    )
    drawn = ("weights", "transformer", "decode", "peak")
    table(
        "GiB while one image is drawn, bfloat16, all parts on the device",
        ["", *drawn],
        [
            [n, *[f"{f[key] / GIB:.2f}" if (key := f"{n}_sampling_{kind}_bytes") in f else "-" for kind in drawn]]
            for n in ("native", "upgraded")
        ],
    )
