"""`davae inspect`: what an upgrade would bring and take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from davae.cli.options import Json, write_json

if TYPE_CHECKING:
    from davae.train.inspection import Inspection

GIB = 2**30


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A hub id, a diffusers folder, or a preset; without one, lists the presets.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels of the upgraded picture; by default `scale` times the model's own.")
    ] = None,
    scale: Annotated[int, typer.Option(min=2, help="s, a power of two.")] = 2,
    detail_channels: Annotated[int | None, typer.Option(min=1, help="D; by default as many as C.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps of the whole picture; by default the pipeline's.")
    ] = None,
    json: Json = None,
) -> None:
    """What an upgrade would bring and take: tokens, FLOPs, parameters, memory. Reads configs, needs no weights.

    `davae inspect sd35-medium --resolution 1024`

    `davae inspect path/to/a/diffusers/folder --json figures.json`
    """
    if model is None:
        _list()
        return
    from davae.display import console
    from davae.train.inspection import inspect_model

    found = inspect_model(model, resolution, scale, detail_channels, steps)
    write_json(json, found.as_dict())
    _show(found)
    for note in found.notes:
        console.print(f"Note: {note}.", markup=False)


def _list() -> None:
    from rich.console import Console

    from davae.zoo.presets import presets

    for name, preset in presets().items():
        Console().print(f"{name:<16} {preset.title} ({preset.hub or 'no hub id'})", markup=False, highlight=False)


def _show(found: Inspection) -> None:
    """The figures as tables."""
    from davae.display import table

    f, layout = found.figures, found.layout
    side, channels = int(f["latent_side"]), layout.channels
    native = side * layout.scale
    table(
        f"{found.model} at {f['resolution']} px",
        ["", "native", "upgraded"],
        [
            ["latent (channels, height, width)", f"({layout.base_channels}, {native}, {native})",
             f"({layout.base_channels}+{layout.detail_channels}={channels}, {side}, {side})"],
            ["pixels per latent position", f["vae_factor"], int(f["vae_factor"]) * layout.scale],
            ["latent positions per token", *[f"{f['patch_size']}x{f['patch_size']}"] * 2],
            ["image tokens", f["native_tokens"], f["upgraded_tokens"]],
        ],
    )  # fmt: skip
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
        rows.append([f"whole picture, {f['steps']} steps {guidance}", shown(old), shown(new), f"{old / new:.2f}x"])
    table(f"{unit}FLOPs of one picture, and the speed-up they allow", ["", "native", "upgraded", "at most"], rows)
    names = [key for key in f if key.endswith("_parameters") or key.startswith("trained_parameters")]
    table("Parameters, M", ["", ""], [[key.replace("_", " "), f"{f[key] / 1e6:.1f}"] for key in names])
    stages = [key.removesuffix("_peak_bytes") for key in f if key.startswith("stage") and key.endswith("_peak_bytes")]
    kinds = ("weights", "gradients", "optimizer", "ema", "activations", "peak")
    table(
        "GiB of a training step of one picture, bfloat16 over float32 weights",
        ["", *kinds],
        [[s.replace("_", " "), *[f"{f[f'{s}_{kind}_bytes'] / GIB:.2f}" for kind in kinds]] for s in stages],
    )
    drawn = ("weights", "transformer", "decode", "peak")
    table(
        "GiB while one picture is drawn, bfloat16, all parts on the device",
        ["", *drawn],
        [
            [n, *[f"{f[key] / GIB:.2f}" if (key := f"{n}_sampling_{kind}_bytes") in f else "-" for kind in drawn]]
            for n in ("native", "upgraded")
        ],
    )
