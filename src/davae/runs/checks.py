"""Checks of a recipe against its base model, before any weight is read."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from davae.backbones.classes import find_class, named_classes
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import supported
from davae.backbones.family import Family, longest_side
from davae.backbones.head_options import HeadOptions, check_family
from davae.cost.flops import check_lora
from davae.data.buckets import bucket_sizes
from davae.data.latent_cache.meta import is_whole
from davae.errors import DataError, ModelError, RecipeError, RunError
from davae.files.reading import read_object
from davae.latent import LatentLayout
from davae.losses.perceptual import perceptual_distance
from davae.pretrained.distilled import Distilled
from davae.pretrained.shapes import BaseShapes
from davae.pretrained.stored import check_component
from davae.publish.assemble import UPGRADE_FILE, check_fit, read_details, read_metadata
from davae.recipes import Recipe, differences, load_recipe
from davae.recipes.sections import Data, FlowOptim, Lora, Reconstruction, Stage2
from davae.recipes.stages import POLISH
from davae.recipes.super_resolution import SuperResolution
from davae.tasks.base_model import BaseModel
from davae.tasks.noising import Objective
from davae.train.locking import kept_origin
from davae.train.ready import check_trainings
from davae.train.run_folder import is_done, was_done
from davae.vae.base import autoencoder_family
from davae.vae.warm_start import filter_shares
from davae.zoo import resolve_upgrade

logger = logging.getLogger(__name__)

GIVEN, TRAINED = ("base", "scale", "detail_channels", "init", "downsample"), ("data", "stage1")
# options of `data` that stage 1 does not read
UNREAD = {"caption_weights": {}, **dict.fromkeys(("caption_key", "caption_column", "label_key", "label_column"))}


def check_recipe(recipe: Recipe, base: BaseModel) -> LatentLayout:
    """Check a recipe against the configs of its base model and return its latent layout.

    Args:
        recipe, base: the upgrade's, and its base model.

    Raises:
        RecipeError: D not a multiple of C, a size that does not divide or that the model cannot draw, a distilled model, or
            gradient checkpointing where the class has none, with the dotted path.
    """
    check_distilled(recipe, base)
    check_detail_time(recipe.stage2, base.family)
    check_head(recipe, base)
    check_lora(base.shapes, recipe.stage2.lora)
    check_dit_alignment(recipe, base)
    check_report_prompts(recipe, base)
    shapes = base.shapes
    if recipe.detail_channels % shapes.channels:
        raise RecipeError(
            f"detail_channels: {recipe.detail_channels} is not a multiple of the {shapes.channels} latent channels of "
            f"{recipe.base.name}; use {shapes.channels * max(1, round(recipe.detail_channels / shapes.channels))}"
        )
    if recipe.scale & (recipe.scale - 1):
        raise RecipeError(f"scale: {recipe.scale} is not a power of two")
    for stage, settings, has in (
        ("stage1", recipe.stage1, autoencoder_family(shapes.vae_class).checkpointing),
        ("stage2", recipe.stage2, model_class(shapes.transformer_class)._supports_gradient_checkpointing),
    ):
        if settings.gradient_checkpointing and not has:
            kind = shapes.vae_class if stage == "stage1" else shapes.transformer_class
            raise RecipeError(
                f"{stage}.gradient_checkpointing: diffusers' {kind} has none that works; set it to false"
            )
    pixels = shapes.vae_factor * recipe.scale
    check_crops(recipe, pixels)
    layout = LatentLayout(shapes.channels, recipe.detail_channels, recipe.scale)
    if recipe.stage1.start == "unfolded":
        try:
            filter_shares(layout)
        except ValueError as error:
            raise RecipeError(f"stage1.start: {error}") from error
    cell = shapes.patch_size * base.family.grid
    step = shapes.vae_factor * cell
    if recipe.base.resolution % step:
        below = recipe.base.resolution // step * step
        raise RecipeError(
            f"base.resolution: {recipe.base.resolution} is not divisible by {step} (autoencoder factor "
            f"{shapes.vae_factor} x patch {cell}); use {below or step} or {below + step}"
        )
    check_buckets(recipe, base)
    if (own := base.only_side) not in (None, recipe.base.resolution):
        raise RecipeError(f"base.resolution: {recipe.base.name} draws {own} pixels and no other size; use {own}")
    return layout


def check_distilled(recipe: Recipe, base: BaseModel) -> Distilled | None:
    """Refuse a base that was distilled to a few steps, and return any other distillation.

    Args:
        recipe, base: the upgrade's, and its base model.

    Raises:
        RecipeError: a distilled base, unless the recipe sets `base.distilled` to `train`.
    """
    found = base.distilled
    if found is None or found.kind == "guidance":
        return found
    text = f"base.model: {found.note(recipe.base.name)}"
    if recipe.base.distilled == "refuse":
        raise RecipeError(f"{text}; or set base.distilled to train, if it is not distilled or you want that")
    logger.warning("%s", text)
    return found


def check_detail_time(settings: Stage2, family: Family) -> None:
    """Refuse an offset of the detail for a model whose channels share one time.

    Raises:
        RecipeError: names the class, and the option that needs no second time.
    """
    if settings.detail_offset and family.detail_time is None:
        raise RecipeError(
            f"stage2.detail_offset: all channels of a {family.class_name} share one time; set stage2.detail_scale instead, "
            "which puts the base ahead in every family"
        )


def check_named_files(recipe: Recipe, shapes: BaseShapes, first: Path) -> None:
    """Check the upgrade to go on from, files of perceptual weights, and what the trainings need.

    Args:
        first: run folder of stage 1; where that is done, its perceptual weights may be gone.
    """
    check_init(recipe, shapes)
    base = recipe.base.train
    if recipe.stage1.polish is not None or not was_done(first, "stage1"):
        check_perceptual(recipe.stage1, None if base is None else base.vae)
    check_trainings({**({} if base is None else base.trainings), **recipe.trainings}, recipe.run, recipe.hardware)


def check_perceptual(*trainings: Reconstruction | SuperResolution | None) -> None:
    """Load the perceptual weights that trainings name, and refuse a file that cannot be used."""
    for settings in trainings:
        if settings is not None and settings.lambda_lpips and settings.perceptual_weights is not None:
            perceptual_distance(settings.perceptual, settings.perceptual_weights)


def check_report_prompts(recipe: Recipe, base: BaseModel) -> None:
    """Refuse prompts of the report that are no classes of a class-conditional base.

    Raises:
        RecipeError: names the prompt, and the classes that the model has.
    """
    if base.num_classes is None or base.planned is not None:  # of a base that a recipe trains the data have the names
        return
    for prompt in recipe.sampling.prompts:
        try:
            find_class(prompt, named_classes(base.configs.index), base.num_classes)
        except ValueError as error:
            raise RecipeError(f"sampling.prompts: {error}") from error


def check_dit_alignment(recipe: Recipe, base: BaseModel) -> None:
    """Refuse an alignment inside a transformer whose features davae cannot read.

    Raises:
        RecipeError: names the class, or the size for which it has no positions.
    """
    if recipe.stage1.dit_alignment is None:
        return
    name, family = "stage1.dit_alignment", base.family
    if family.blocks is None:
        known = ", ".join(one.class_name for one in supported() if one.blocks is not None)
        raise RecipeError(
            f"{name}: davae reads no features of a {family.class_name}; leave it out, or use one of {known}"
        )
    if why := base.cannot_draw(recipe.resolution):
        raise RecipeError(f"{name}: the base would see the whole image; {why}; leave it out")


def check_head(recipe: Recipe, base: BaseModel) -> None:
    """Refuse options of the detail's rows that a model lacks, and warn of a bad pair.

    Args:
        recipe, base: the upgrade's, and its base model.

    Raises:
        RecipeError: another class than davae's own, or one of its models that predicts epsilon.
    """
    options = HeadOptions.of(recipe.stage2)
    key = "stage2.linear_skip" if options.linear_skip else "stage2.detail_prediction"
    try:
        check_family(base.family, options)
    except ModelError as error:
        raise RecipeError(f"{key}: {error}; leave it out") from error
    if options and base.shapes.transformer_config.get("prediction_type", "velocity") != "velocity":
        raise RecipeError(f"{key}: {recipe.base.name} predicts epsilon, this option is for velocities; leave it out")
    s = recipe.stage2
    if s.linear_skip and s.clean_base and not (s.detail_offset or s.detail_residual):
        logger.warning(
            "stage2.linear_skip with clean_base: the skip takes a clean base for a noised one; set stage2.detail_residual or "
            "detail_offset, with which it does not"
        )


def check_crops(recipe: Recipe, pixels: int) -> None:
    """Check the squares on which stage 1 and its polish train.

    Args:
        recipe, pixels: of the upgrade, and of a latent position.

    Raises:
        RecipeError: a side that is not a multiple of it, or above the resolution.
    """
    for name, own in (("stage1", recipe.stage1), (POLISH, recipe.stage1.polish)):
        crop = None if own is None else own.crop
        if crop is not None and (crop % pixels or crop > recipe.resolution):
            near = min(recipe.resolution, max(1, round(crop / pixels)) * pixels)
            raise RecipeError(
                f"{name}.crop: {crop} is not a multiple of {pixels}, the pixels of a latent position, up to the "
                f"resolution {recipe.resolution}; use {near}"
            )


def check_init(recipe: Recipe, shapes: BaseShapes) -> None:
    """Check that an upgrade to go on from fits the recipe, by its metadata, headers and configs.

    Raises:
        RecipeError: another LoRA, D, scale, base or normalised detail than the recipe's, with the dotted path.
        ModelError: nothing there, or what is there is damaged.
    """
    if recipe.init is None:
        return
    file = (folder := resolve_upgrade(recipe.init)) / UPGRADE_FILE
    details = read_details(file, read_metadata(file))
    if (details.class_name, details.base_channels) != (shapes.transformer_class, shapes.channels):
        raise RecipeError(
            f"init: {recipe.init} upgrades a {details.class_name} of {details.base_channels} channels, {recipe.base.name} "
            f"has a {shapes.transformer_class} of {shapes.channels}"
        )
    detail = details.detail_channels
    if detail != recipe.detail_channels:
        raise RecipeError(f"init: {recipe.init} has {detail} detail channels; set detail_channels to {detail}")
    (own, own_text), (found, found_text) = (_lora_text(lora) for lora in (recipe.stage2.lora, details.lora))
    if own != found:
        raise RecipeError(
            f"stage2.lora: {own_text}, and init goes on from {recipe.init} with {found_text}; set stage2.lora to it"
        )
    if bool(details.detail_offset) != bool(recipe.stage2.detail_offset):
        raise RecipeError(
            f"stage2.detail_offset: {recipe.stage2.detail_offset:g}, and init goes on from {recipe.init} with "
            f"{details.detail_offset:g}; the detail has a time of its own in both or in neither"
        )
    if (head := HeadOptions.of(recipe.stage2)) != details.head:
        raise RecipeError(
            f"stage2: linear_skip is {head.linear_skip} and the detail's prediction {head.prediction}, and init goes on from "
            f"{recipe.init} with {details.head.linear_skip} and {details.head.prediction}; set them alike"
        )
    place = folder / details.vae_folder
    vae = read_object(place / "config.json")
    check_component(place, f"DetailVAE {place}")
    for key, found in (("scale", details.detail_scale), ("residual", vae.get("detail_kernel_size") is not None)):
        if (value := getattr(recipe.stage2, f"detail_{key}")) != found:
            raise RecipeError(
                f"stage2.detail_{key}: {value}, and init goes on from {recipe.init}, which was trained with {found}; set "
                f"stage2.detail_{key}={str(found).lower()}"
            )
    for key, wanted in (("base_class", shapes.vae_class), ("scale", recipe.scale), ("downsample", recipe.downsample)):
        if vae.get(key, {"scale": 2, "downsample": "antialias"}.get(key)) != wanted:
            raise RecipeError(f"init: the DetailVAE of {recipe.init} has {key} {vae.get(key)}, this recipe {wanted}")
    check_fit(file, shapes.transformer_class, shapes.transformer_config)


def _lora_text(lora: Lora | None) -> tuple[Lora | None, str]:
    """Return a LoRA with alpha set, by default to the rank, and its form in a recipe."""
    if lora is None:
        return None, "null"
    whole = lora.model_copy(update={"alpha": float(lora.alpha or lora.rank)})
    further = f", extra_targets: [{', '.join(lora.extra_targets)}]" if lora.extra_targets else ""
    further += ", train_norms: true" if lora.train_norms else ""
    return whole, f"{{rank: {lora.rank}, alpha: {whole.alpha:g}{further}}}"


def check_shared(recipe: Recipe, folder: Path) -> str:
    """Check that another run's DetailVAE is the one that this recipe would make.

    Returns:
        Why its cache does not serve this recipe; "" where it does.

    Raises:
        DataError: the run has not finished its stage 1, or its recipe makes another one, with the place.
    """
    file = folder / "recipe.yaml"
    other, whole = load_recipe(str(file)) if file.is_file() else None, is_whole(folder / "cache")
    if other is not None and not isinstance(other, Recipe):
        raise DataError(f"--stage1 {folder} is a run of the base recipe '{other.name}', not of an upgrade")
    if other is None or not (whole or is_done(folder, other, "stage1")):
        raise DataError(f"--stage1 {folder} holds no run whose stage 1 is done; run `davae train-vae` there first")
    parts, read = GIVEN if recipe.init is not None else GIVEN + TRAINED, (one.stage1_data for one in (other, recipe))
    if changed := _changed(other, recipe, parts, *(data.model_copy(update=UNREAD) for data in read)):
        raise DataError(f"--stage1 {folder} was made from another autoencoder or data: {changed[0]}")
    if other.stage1.polish is not None and recipe.stage1.polish is None:
        logger.warning("--stage1 %s: its polished decoder is left, as this recipe has no stage1.polish", folder)
    changed = _changed(other, recipe, ("data", "cache", "run.seed"), other.stage2_data, recipe.stage2_data)
    return "" if whole and not changed else changed[0] if changed else "it has no whole one"


def taken_from(run: Path, trains_base: bool) -> Path | None:
    """Return the run of an earlier `--stage1` whose base or stage 1 a run lacks.

    Raises:
        RunError: it is gone, or the run began and noted none.
    """
    base, own = trains_base and not (run / "base").is_dir(), was_done(run, "stage1")
    later = any(any(run.glob(f"checkpoints/{step}*")) for step in (POLISH, "stage2"))
    if (own and not base) or not (own or later):  # vae/ alone may hold another's, with this run's statistics
        return None
    origin, what = kept_origin(run), "base" if base else "stage 1"
    if origin is None or not origin.is_dir():
        unknown = "; where another run has it, give that"
        why = f", it was taken from {origin}; give that run's place" if origin else unknown
        raise RunError(f"{run}: its {what} is not there{why} to `davae train-dit --stage1`")
    logger.info("%s goes on with the %s of %s (--stage1)", run, what, origin)
    return origin


def _changed(one: Recipe, other: Recipe, parts: tuple[str, ...], mine: Data, theirs: Data) -> list[str]:
    """Return the differences of two recipes in some parts, with a stage's own images as `data`."""
    own = one.model_copy(update={"data": mine}), other.model_copy(update={"data": theirs})
    free = ("num_workers", "require_captions", "cache.batch_size", "stage1.data", POLISH)
    return [change for change in differences(*own, free=free) if re.match(rf"({'|'.join(parts)})[.:]", change)]


def check_objective(recipe: Recipe, base: BaseModel) -> Objective:
    """Return the objective of the recipe's base model, flow matching where it is trained first.

    Args:
        recipe, base: the upgrade's, and its base model.

    Raises:
        ModelError: an objective that stage 2 cannot train.
        RecipeError: timesteps shaped for a model whose timesteps are uniform.
    """
    objective = base.objective(recipe.stage2)
    check_timesteps(recipe.stage2, objective)
    return objective


def check_timesteps(settings: Stage2, objective: Objective) -> None:
    """Refuse timesteps and weights of flow matching for a model of another objective.

    Raises:
        RecipeError: one of them is set, with its dotted path.
    """
    if objective.prediction == "flow":
        return
    if settings.detail_offset:
        raise RecipeError(
            f"stage2.detail_offset: belongs to flow matching; this model's scheduler has {objective.prediction}; use "
            "stage2.detail_scale"
        )
    if settings.x0_ratio_max is not None:
        raise RecipeError(
            f"stage2.x0_ratio_max: weighs flow matching; this model's scheduler has {objective.prediction}; use min_snr_gamma"
        )
    for name in ("timestep_mean", "timestep_std", "timestep_shift"):
        if getattr(settings, name) != FlowOptim.model_fields[name].default:
            raise RecipeError(
                f"stage2.{name}: belongs to flow matching; this model's scheduler belongs to {objective.prediction}, whose "
                f"timesteps are uniform. Leave it out"
            )


def check_buckets(recipe: Recipe, base: BaseModel) -> None:
    """Check the buckets of both stages before any of them trains.

    Raises:
        RecipeError: buckets of a model of squares, or one of stage 2 longer than the transformer's table of positions.
    """
    step, longest = base.bucket_step(recipe.scale), longest_side(base.shapes.transformer_config)
    for stage, data, own in (
        ("stage1", recipe.stage1_data, recipe.stage1.data),
        ("stage2", recipe.stage2_data, recipe.stage2.data),
    ):
        if (buckets := data.buckets) is None:
            continue
        path = "data.buckets" if own is None else f"{stage}.data.buckets"
        if step is None:
            raise RecipeError(f"{path}: this model takes square images only; leave it out")
        sizes = bucket_sizes(recipe.resolution, step, buckets.max_ratio, buckets.tokens)
        side = max(max(size) for size in sizes) // step
        if stage == "stage2" and longest is not None and side > longest:
            raise RecipeError(
                f"{path}.max_ratio: {buckets.max_ratio} gives {side} tokens in a row, {recipe.base.name} knows "
                f"positions up to {longest}; lower it"
            )
