"""`davae convert`: official checkpoints in, diffusers folders out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from davae.commands.progress import show_place
from davae.commands.verbs import Verbs
from davae.errors import RecipeError

convert_app = Verbs(
    no_args_is_help=True, help="Official checkpoints in, diffusers folders out. No code of a checkpoint is ever run."
)

Checkpoint = Annotated[Path, typer.Argument(help="A .pt, .pth, .ckpt or .safetensors file.")]
Target = Annotated[Path, typer.Option("--out", help="The diffusers folder to write.")]
Vae = Annotated[
    str | None, typer.Option(help="A diffusers autoencoder; with it a whole pipeline is written, ready to sample.")
]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="What the weights cannot say, e.g. num_heads=16."),
]
Statistics = Annotated[Path | None, typer.Option(help="The official latents_stats.pt.")]


def _sizes(pairs: list[str] | None) -> dict[str, Any]:
    from davae.recipes.values import read_value

    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes name=value, found '{pair}'")
        values[name.strip()] = read_value(text, f"--set {name}")
    return values


def _transformer(
    kind: Literal["lightningdit", "sit", "repa", "dit"],
    file: Path,
    out: Path,
    vae: str | None,
    sizes: list[str] | None,
) -> None:
    from davae.convert.lightningdit import convert_transformer

    show_place(convert_transformer(kind, file, out, vae, _sizes(sizes)))


@convert_app.command("lightningdit")
def lightningdit_verb(file: Checkpoint, out: Target, vae: Vae = None, set: Sizes = None) -> None:
    """Official LightningDiT weights. The pipeline samples as theirs: shift 0.3, interval from 0.2, guidance on 3 channels.

    `davae convert lightningdit lightningdit-xl.pt --vae vavae/ --out lightningdit-xl`
    """
    _transformer("lightningdit", file, out, vae, set)


@convert_app.command("sit")
def sit_verb(
    file: Checkpoint,
    out: Target,
    vae: Vae = None,
    set: Sizes = None,
    repa: Annotated[
        bool, typer.Option("--repa", help="The weights are REPA's, which counts time from data.")
    ] = False,
) -> None:
    """Official SiT weights, or REPA's.

    `davae convert sit SiT-XL-2.pt --vae sd-vae/ --set num_heads=16 --out sit`
    """
    _transformer("repa" if repa else "sit", file, out, vae, set)


@convert_app.command("dit")
def dit_verb(file: Checkpoint, out: Target, vae: Vae = None, set: Sizes = None) -> None:
    """Official DiT weights.

    `davae convert dit DiT-XL-2.pt --vae sd-vae/ --set num_heads=16 --out dit`
    """
    _transformer("dit", file, out, vae, set)


@convert_app.command("vavae")
def vavae_verb(
    file: Checkpoint,
    out: Target,
    config: Annotated[Path | None, typer.Option(help="The official YAML; the released f16d32's by default.")] = None,
    statistics: Statistics = None,
) -> None:
    """Official VA-VAE weights as a diffusers AutoencoderKL.

    `davae convert vavae vavae.pt --statistics latents_stats.pt --out vavae`
    """
    from davae.convert.vavae import convert_vavae

    show_place(convert_vavae(file, out, config, statistics))


@convert_app.command()
def davae(
    file: Checkpoint,
    out: Target,
    config: Annotated[Path, typer.Option(help="The official YAML, with ddconfig_base and ddconfig_da.")],
    statistics: Statistics = None,
) -> None:
    """The authors' DA-VAE weights as a DetailVAE.

    `davae convert davae da.ckpt --config da.yaml --out detail-vae`
    """
    from davae.convert.davae import convert_davae

    show_place(convert_davae(file, out, config, statistics))


@convert_app.command()
def tiny(
    encoder: Annotated[
        Path, typer.Argument(help="taesd_encoder, taef1_encoder or taef2_encoder, .pth or .safetensors.")
    ],
    decoder: Annotated[Path, typer.Argument(help="The decoder of the same.")],
    out: Target,
) -> None:
    """The tiny autoencoders' own files (TAESD, TAEF1, TAEF2) as a diffusers autoencoder.

    `davae convert tiny taef2_encoder.pth taef2_decoder.pth --out taef2`
    """
    from davae.convert.tiny import convert_tiny

    show_place(convert_tiny(encoder, decoder, out))


@convert_app.command()
def lora(
    file: Annotated[Path, typer.Argument(help="A LoRA of the base, .safetensors.")],
    upgraded: Annotated[str, typer.Option(help="The upgraded pipeline: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The LoRA file to write.")],
) -> None:
    """A LoRA of the pretrained model for its upgraded one: only what touches the patch embedder or the head changes.

    `davae convert lora style.safetensors --upgraded micro-128 --out style-128.safetensors`
    """
    from davae.convert.lora import convert_lora

    show_place(convert_lora(file, upgraded, out))
