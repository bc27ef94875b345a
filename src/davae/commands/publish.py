"""`davae export`, `davae apply` and `davae push`: models that leave a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.progress import show_hint, show_place

Precision = Annotated[
    Literal["float16", "bfloat16", "float32"],
    typer.Option("--dtype", metavar="TYPE", help="Precision of the weights: float16, bfloat16 or float32."),
]
SelfContained = Annotated[
    bool,
    typer.Option(
        "--self-contained", help="Bring along the code, so that it loads with trust_remote_code=True without davae."
    ),
]
BaseDecoder = Annotated[
    bool, typer.Option("--base-decoder", help="Bring along the base's own decoder, for previews while it draws.")
]


def export_verb(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    kind: Annotated[
        Literal["fused", "lora", "upgrade"] | None,
        typer.Option(
            "--as",
            help="`fused`: a pipeline with everything folded in. `lora`: a pipeline, and LoRA as a file of its own. "
            "`upgrade`: vae/ and upgrade.safetensors without the base. Default: upgrade, or fused with --self-contained.",
        ),
    ] = None,
    dtype: Precision = "float16",
    self_contained: SelfContained = False,
    base: Annotated[str | None, typer.Option(help="The pretrained model, where the recipe's place is gone.")] = None,
    base_decoder: BaseDecoder = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Store the changes of a full fine-tuning at this rank: a smaller upgrade, an approximation."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="8: store these changes in 8 bits: half the size, and nearly exact. In place of --rank."),
    ] = None,
) -> None:
    """Write a finished run to a folder of its own, with a model card: as a pipeline, or without its base.

    `davae export runs/micro --out micro-upgrade` (the detail VAE and what stage 2 trained, a few megabytes)

    `davae export runs/micro --as fused --out micro-128`

    `davae export runs/micro --as lora --out micro-128-lora` (then `pipe.load_lora_weights("micro-128-lora")`)

    `davae export runs/micro --self-contained --out micro-128`
    """
    import torch

    from davae.publish.export import export

    chosen = kind or ("fused" if self_contained or base_decoder else "upgrade")
    precision = getattr(torch, dtype)
    whole = {"self_contained": self_contained, "base_decoder": base_decoder}
    done = export(run, out, chosen, precision, base=base, rank=rank, bits=bits, **whole)
    show_hint("Its README.md has how to load it.")
    show_place(done)


def apply_verb(
    upgrade: Annotated[
        str, typer.Argument(help="An exported upgrade: its folder, its file, a hub id, or `NAME-upgraded`.")
    ],
    base: Annotated[str, typer.Option(help="The pretrained model: a diffusers folder, a hub id, or `micro`.")],
    out: Annotated[Path, typer.Option(help="Folder for the upgraded pipeline.")],
    vae: Annotated[
        Path | None, typer.Option(help="The upgrade's DetailVAE, where it is not next to the file.")
    ] = None,
    dtype: Precision = "float16",
    self_contained: SelfContained = False,
    base_decoder: BaseDecoder = False,
) -> None:
    """Put an upgrade onto its pretrained model: a diffusers pipeline folder.

    `davae apply micro-upgrade --base micro --out micro-128`

    `davae apply ORGANISATION/NAME --base stabilityai/stable-diffusion-3.5-medium --out sd35-1k`
    """
    import torch

    from davae.publish.export import apply
    from davae.publish.upgrade_file import find_upgrade

    found, precision = find_upgrade(upgrade, vae), getattr(torch, dtype)
    done = apply(found, base, out, precision, self_contained=self_contained, base_decoder=base_decoder)
    show_place(done)


def push_verb(
    folder: Annotated[Path, typer.Argument(help="A folder that `davae export` or `davae apply` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME or ORGANISATION/NAME on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; it is private otherwise.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
) -> None:
    """Upload an exported folder to the Hugging Face hub. Log in with `hf auth login` first.

    `davae push micro-128 me/micro-128` (private)

    `davae push micro-128 me/micro-128 --public`
    """
    from davae.publish.hub import push

    show_place(push(folder, repo_id, public=public, message=message))
