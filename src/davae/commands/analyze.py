"""`davae analyze`: the paper's figures for any run, as PNG and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.commands.options import Offload, Options, Precision, Seed, chosen_data, sampling_options
from davae.commands.progress import show_place
from davae.commands.verbs import Verbs

analyze_app = Verbs(no_args_is_help=True, help="Figures of the paper for any run: a PNG and a JSON each.")

Vae = Annotated[str, typer.Option(help="A DetailVAE's folder, or a run's.")]
Data = Annotated[str, typer.Option(help="Images, as `davae upgrade --data` takes them.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder for the PNG and the JSON.")]
Num = Annotated[int, typer.Option(min=8, help="Images to use, at most.")]
HeldOut = Annotated[
    float, typer.Option(min=0.0, max=0.99, metavar="SHARE", help="Only this held-out share; 0 takes all.")
]

LpipsNetwork = Annotated[Literal["alex", "vgg"] | None, typer.Option(help="LPIPS too, on this network.")]
LpipsWeights = Annotated[
    str | None, typer.Option(help="Its safetensors (trunk and heads), where torchvision cannot download.")
]
FeatureNetwork = Annotated[
    Literal["lite0", "inception"], typer.Option(help="Of the distance to the originals: inception gives rFID.")
]
FeatureWeights = Annotated[Path | None, typer.Option(help="Inception weights of torch-fidelity, without a network.")]


@analyze_app.command()
def sensitivity(
    vae: Vae,
    base: Annotated[str, typer.Option(help="The base autoencoder, or its pipeline's folder.")],
    data: Data,
    out: Folder = Path("figures"),
    num: Num = 256,
    held_out: HeldOut = 0.0,
    lpips: LpipsNetwork = None,
    lpips_weights: LpipsWeights = None,
    features: FeatureNetwork = "lite0",
    feature_weights: FeatureWeights = None,
    set: Options = None,
) -> None:
    """Full, zeroed and random detail, decoded (Tab. S2a, S3): PSNR, SSIM, distances to the originals.

    Random detail comes with the training set's statistics, and from N(0, I) as in the paper.

    `davae analyze sensitivity --vae runs/micro --base micro --data openmoji --held-out 0.1`
    """
    from davae.analyze.sensitivity import sensitivity_figure

    done = sensitivity_figure(
        vae,
        base,
        chosen_data(data, set, {}),
        out,
        num=num,
        held_out=held_out,
        lpips=lpips,
        lpips_weights=lpips_weights,
        features=features,
        feature_weights=feature_weights,
    )
    show_place(done)


@analyze_app.command()
def spectra(
    vae: Vae,
    data: Data,
    out: Folder = Path("figures"),
    num: Num = 256,
    held_out: HeldOut = 0.0,
    set: Options = None,
) -> None:
    """Radial spectra of z and z_d (Fig. S5): power of standardised channels, and absolute energy.

    `davae analyze spectra --vae runs/micro --data openmoji --held-out 0.1`
    """
    from davae.analyze.spectra import spectra_figure

    show_place(spectra_figure(vae, chosen_data(data, set, {}), out, num=num, held_out=held_out))


@analyze_app.command()
def latents(
    vae: Vae,
    data: Data,
    unaligned: Annotated[str | None, typer.Option(help="The same trained with lambda_align 0.")] = None,
    out: Folder = Path("figures"),
    num: Num = 1000,
    held_out: HeldOut = 0.0,
    set: Options = None,
) -> None:
    """Latent maps by PCA, a linear probe, silhouettes and a scatter by class (Fig. 3).

    `davae analyze latents --vae runs/aligned --unaligned runs/unaligned --data photos/`
    """
    from davae.analyze.latents import latents_figure

    show_place(latents_figure(vae, unaligned, chosen_data(data, set, {}), out, num=num, held_out=held_out))


@analyze_app.command()
def curves(run: Annotated[Path, typer.Argument(help="A run folder.")], out: Folder = Path("figures")) -> None:
    """Base and detail loss of stage 2 (Fig. S3).

    `davae analyze curves runs/micro`
    """
    from davae.analyze.curves import curves_figure

    show_place(curves_figure(run, out))


@analyze_app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders; a line each, named by its folder, by its path where folders have one name."
        ),
    ],
    out: Folder = Path("figures"),
) -> None:
    """Stage 2 of several runs side by side, zero against random new weights for example (Fig. 4).

    `davae analyze compare runs/zero runs/random`
    """
    from davae.analyze.curves import compared_runs_figure, named_runs

    show_place(compared_runs_figure(named_runs(runs), out))


@analyze_app.command()
def retention(
    base: Annotated[str, typer.Argument(help="The pretrained model: a folder, a hub id, or `micro`.")],
    upgrade: Annotated[str, typer.Argument(help="Its upgrade: a run or pipeline folder, or `NAME-upgraded`.")],
    data: Data,
    out: Folder = Path("figures"),
    num: Num = 32,
    held_out: HeldOut = 0.0,
    drawn: Annotated[int, typer.Option(min=1, max=64, help="Images that both draw from the same noise.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns it off.")] = 4.0,
    seed: Seed = 0,
    dtype: Precision = "float32",
    offload: Offload = "off",
    lpips: LpipsNetwork = None,
    lpips_weights: LpipsWeights = None,
    lora: Annotated[
        Path | None, typer.Option(help="Compare the effect of this LoRA of the base on both as well.")
    ] = None,
    set: Options = None,
) -> None:
    """How much of what the base knew an upgrade keeps: its base prediction by noise level, its base images.

    `davae analyze retention micro micro-upgraded --data openmoji --held-out 0.1`

    `davae analyze retention micro micro-upgraded --data openmoji --held-out 0.1 --lora style.safetensors`
    """
    from davae.analyze.retention import retention_figure

    done = retention_figure(
        base,
        upgrade,
        chosen_data(data, set, {}),
        out,
        sampling_options({**locals(), "batch_size": 4}),
        num=num,
        held_out=held_out,
        drawn=drawn,
        lpips=lpips,
        lpips_weights=lpips_weights,
        lora=lora,
    )
    show_place(done)


@analyze_app.command()
def diffusability(
    vae: Annotated[str, typer.Argument(help="A DetailVAE's folder, or a run's.")],
    data: Data,
    out: Folder = Path("figures"),
    num: Num = 256,
    held_out: HeldOut = 0.0,
    probe_steps: Annotated[int, typer.Option(help="Steps of the small probe denoiser; 0 leaves it out.")] = 300,
    seed: Seed = 0,
    set: Options = None,
) -> None:
    """How hard a detail latent will be to learn: alignment, spectra, channels, and the loss of a small probe denoiser.

    `davae analyze diffusability runs/micro --data openmoji`
    """
    from davae.analyze.diffusability import diffusability_figure

    chosen = chosen_data(data, set, {})
    done = diffusability_figure(vae, chosen, out, num=num, held_out=held_out, probe_steps=probe_steps, seed=seed)
    show_place(done)


@analyze_app.command()
def gap(
    model: Annotated[str, typer.Argument(help="An upgrade: a run or pipeline folder, or `NAME-upgraded`.")],
    data: Data,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.99, metavar="SHARE", help="The share that training held out, above 0.")
    ],
    out: Folder = Path("figures"),
    num: Num = 256,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 or less turns it off.")] = 2.5,
    seed: Seed = 0,
    features: FeatureNetwork = "lite0",
    feature_weights: FeatureWeights = None,
    patch_size: Annotated[
        int, typer.Option(min=0, help="Side of the crops of the patch distance; 0 leaves it out.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    dtype: Precision = "float32",
    offload: Offload = "off",
    set: Options = None,
) -> None:
    """Where the distance to real images comes from: the decoder, the detail, or the base.

    `davae analyze gap micro-upgraded --data openmoji-all --held-out 0.1`
    """
    from davae.analyze.gap import gap_figure

    done = gap_figure(
        model,
        chosen_data(data, set, {}),
        out,
        sampling_options(locals()),
        num=num,
        held_out=held_out,
        features=features,
        feature_weights=feature_weights,
        patch_size=patch_size,
    )
    show_place(done)
