"""The phases of an upgrade of an inspected model, with the steps and batches of Tab. S1 and one image a pass."""

from __future__ import annotations

from davae.cost.memory import TrainingStep
from davae.plan.dry_run import Plan
from davae.plan.inspect import LORA_RANK, Inspection, readable_name
from davae.plan.phase_facts import ASSUMED_IMAGES, ImageFacts, text_facts
from davae.plan.phase_sizes import Sizes
from davae.plan.phases import drawn_request, plan_phases, remember
from davae.pretrained.text_encoders import text_encoders
from davae.recipes.schema import Base, Recipe
from davae.recipes.sections import Lora, Run, Stage1, Stage2
from davae.train.shares import Share

STEPS, IMAGES = 10_000, (16, 128)  # Tab. S1, text-to-image


def step_of(found: Inspection, prefix: str, flops: float) -> TrainingStep:
    """Return a rehearsed training step from the inspection's figures."""
    names = ("weights", "gradients", "optimizer", "ema", "activations")
    return TrainingStep(**{name: int(found.figures[f"{prefix}_{name}_bytes"]) for name in names}, flops=flops)


def inspected_phases(found: Inspection) -> Plan | None:
    """Return the phases, reckoned with one GPU of the dry run's default; None where davae cannot train the model."""
    f, shapes = found.figures, found.shapes
    if "bound" not in f:
        return None
    name = readable_name(found.model)
    recipe = Recipe(
        name="inspect",
        base=Base(model=found.model, resolution=int(f["resolution"]) // int(f["scale"])),
        scale=int(f["scale"]),
        detail_channels=found.layout.detail_channels,
        stage1=Stage1(max_steps=STEPS, batch_size=1, accumulation=IMAGES[0]),
        stage2=Stage2(max_steps=STEPS, batch_size=1, accumulation=IMAGES[1], lora=Lora(rank=LORA_RANK)),
        run=Run(mixed_precision="bf16"),
    )
    kind = "stage2_lora_checkpointed" if "stage2_lora_checkpointed_peak_bytes" in f else "stage2_lora"
    encode, decode = f["upgraded_vae_encode_flops"], f["upgraded_vae_decode_flops"]
    sizes = Sizes(
        recipe=recipe,
        shapes=shapes,
        layout=found.layout,
        step1=step_of(found, "stage1", 3 * (encode + decode)),
        step2=step_of(found, kind, (4 if "checkpointed" in kind else 3) * f["upgraded_flops"]),
        text=text_facts(name, shapes, text_encoders(name, shapes.transformer_config)),
        images=ImageFacts(ASSUMED_IMAGES, False),
        transformer=int(f["transformer_parameters"]),
        trained=int(f[f"trained_parameters_lora{LORA_RANK}"]),
        base_vae=int(f["vae_parameters"]),
        detail_vae=int(f["detail_vae_parameters"]),
        encode_flops=encode,
        decode_flops=decode,
        upgraded_flops=f["upgraded_flops"],
        native_flops=f["native_flops"],
        share1=Share(1, IMAGES[0]),
        share2=Share(1, IMAGES[1]),
    )
    take_over(found, sizes)
    return Plan({}, [], plan_phases(sizes), sizes.hardware)


def take_over(found: Inspection, sizes: Sizes) -> None:
    """Let the phases know the sampling memory that the inspection has rehearsed."""
    f = found.figures
    for name, factor in (("native", sizes.layout.scale), ("upgraded", 1)):
        asked = drawn_request(sizes, int(f["latent_side"]) * factor, upgraded=name == "upgraded")
        remember(int(f[f"{name}_sampling_decode_bytes"]), "decode", asked)
        remember(int(f[f"{name}_sampling_transformer_bytes"]), "pass", int(f["passes_per_step"]), asked)
