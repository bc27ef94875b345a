"""The model card of an exported folder: README.md as the hub reads it."""

from __future__ import annotations

import inspect
import json
import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData

import davae
from davae.backbones.classes_by_name import model_class
from davae.backbones.families import component_in, family_by_class
from davae.data.openmoji import CREDIT
from davae.errors import ModelError
from davae.pretrained.open import HUB_ID, MissingPart, fetch_file, read_config
from davae.publish.changes import Changes
from davae.publish.escape import as_code, as_prose, encodable, fence, one_line
from davae.recipes import Recipe
from davae.zoo import MODELS, resolve, split_revision

LICENCE = ("license", "license_name", "license_link")  # its line in a hub card


@dataclass(frozen=True)
class Origin:
    """Origin of an exported folder.

    Attributes:
        base: the pretrained model: a folder or a hub id.
        kind: `fused`, `lora` or `upgrade`.
        self_contained: whether the folder brings davae's code along.
        recipe, report: the run's own; None for a pipeline that was put together from an upgrade file.
        changes: how an upgrade stores changes, where it has no weights.
    """

    base: str
    kind: str
    self_contained: bool
    recipe: Recipe | None = None
    report: dict[str, Any] | None = None
    changes: Changes | None = None

    @property
    def base_name(self) -> str:
        """The base as others know it: a hub id, an embedded model's name, or a folder's last part."""
        embedded = {str(folder): name for name, folder in MODELS.items()}
        if self.base in embedded:
            return embedded[self.base]
        if self.recipe is not None and self.recipe.base.train is not None:
            return self.recipe.base.train.name
        return Path(self.base).name if Path(self.base).is_dir() else self.base

    @property
    def base_argument(self) -> str:
        """Return the base as a user types it, without the folders of this machine."""
        return (
            f"path/to/{self.base_name}"
            if Path(self.base).is_dir() and self.base_name not in MODELS
            else self.base_name
        )

    @property
    def own_reconstructions(self) -> list[dict[str, Any]]:
        """Return the report's rows of this model and its base, without the shipped upgrade's."""
        rows = self.report["reconstruction"] if self.report else []
        return [row for row in rows if row.get("model") != "shipped" and row["name"] != "full, shipped"]

    @property
    def reconstruction_images(self) -> str:
        """Return number and kind of the reconstructed images, which earlier reports do not contain."""
        known = (self.report or {}).get("reconstruction_images")
        count = next(
            (f"{row['pictures']} " for row in self.own_reconstructions if type(row.get("pictures")) is int), ""
        )
        if known is None and self.recipe is not None and self.recipe.stage1_data.holdout == 0:
            known = "training"
        if known == "training":
            words = "training images (the run held none out, so these figures do not measure new images)"
        else:
            words = f"held-out image{'' if count == '1 ' else 's'}"
        return f"{count}{words}" if count else words.capitalize()

    @property
    def openmoji(self) -> bool:
        """Return whether OpenMoji's artwork trained it, or its embedded base."""
        data = self.recipe is not None and any(
            part.source.startswith("openmoji") for part in (self.recipe.stage1_data, self.recipe.stage2_data)
        )
        return data or self.base == str(MODELS["micro"])


def base_licence(base: str) -> tuple[dict[str, str], str]:
    """(fields of the base's own card, one sentence on the licence of what derives from it)."""
    try:
        card = ModelCard.load(fetch_file(base, "", "README.md"))
    except MissingPart:
        return {}, _unknown("comes without a model card")
    except ModelError:
        return {}, _unknown("cannot be reached from here, so that its model card was not read")
    except (ValueError, yaml.YAMLError):
        return {}, _unknown("has a model card whose header cannot be read")
    fields = {key: one_line(value) for key, value in card.data.to_dict().items() if key in LICENCE}
    if "license" not in fields:
        return {}, _unknown("has a model card that names none")
    name = fields.get("license_name", fields["license"])
    return fields, f"As the base: {as_prose(name)}. Weights that derive from the base stay under its licence."


def _unknown(why: str) -> str:
    return f"Unknown: the base {why}. Look its licence up before you pass this on: derived weights are under it too."


def public_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML without defaults, paths shortened to their last part."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(entry) for key, entry in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(shorten(values), sort_keys=False, allow_unicode=True)


def write_card(folder: Path, origin: Origin, index: dict[str, Any]) -> Path:
    """Write README.md into an exported folder, given the pipeline's model_index.json."""
    name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]
    fields, licence = base_licence(origin.base)
    recipe, (hub_id, _) = origin.recipe, split_revision(origin.base)
    by_prompt = _family(index).condition == "text"
    data = ModelCardData(
        base_model=hub_id if HUB_ID.fullmatch(hub_id) and not Path(hub_id).is_dir() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if by_prompt else "unconditional-image-generation",
        tags=["davae", "diffusers", name, *(["lora"] if origin.kind == "lora" else [])],
        license=fields.get("license", "unknown"),
        license_name=fields.get("license_name"),
        license_link=fields.get("license_link"),
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": as_prose, "code": as_code}
    template = environment.from_string(files("davae.publish").joinpath("card.md").read_text(encoding="utf-8"))
    sizes = None if recipe is None else (recipe.base.resolution, recipe.resolution)
    asked, base = _asked(name, recipe), shlex.quote(encodable(origin.base_argument))
    prompts = recipe.sampling.prompts if recipe is not None else ()
    typed = shlex.quote(encodable(prompts[0] if prompts else "a red rose" if by_prompt else "0"))
    shown = None if recipe is None else public_recipe(recipe)
    body = template.render(
        o=origin,
        pipeline=name,
        home="diffusers" if hasattr(diffusers, name) else "davae",
        version=davae.__version__,
        sizes=sizes,
        asked=asked,
        base=base,
        typed=typed,
        fence=fence(asked, base, typed, shown),
        pixels=_pixels(name, recipe),
        guided=recipe.sampling if recipe is not None else None,
        guidance=_guidance(folder, origin, index),
        vae=read_config(str(folder), "vae"),
        licence=licence,
        credit=CREDIT if origin.openmoji else None,
        recipe=shown,
        images=origin.reconstruction_images,
    )
    path = folder / "README.md"
    path.write_text(encodable(f"---\n{data.to_yaml()}\n---\n\n{body}"), encoding="utf-8")
    return path


def _asked(pipeline: str, recipe: Recipe | None) -> str:
    """Return the name of the argument that takes a prompt or a class."""
    parameters = inspect.signature(model_class(pipeline).__call__).parameters
    if "class_labels" in parameters:
        return "class_labels=[0]"
    if pipeline == "ClassConditionalPipeline":
        return "prompt=0"
    prompts = recipe.sampling.prompts if recipe is not None else ()
    return encodable(json.dumps(prompts[0] if prompts else "a red rose", ensure_ascii=False))


def _guidance(folder: Path, origin: Origin, index: dict[str, Any]) -> dict[str, Any]:
    """Return the guidance arguments of a call, none of a base that cannot be read from here."""
    if origin.recipe is None:
        return {}
    alone, part = origin.kind == "upgrade", str(component_in(index))  # an upgrade is without its transformer
    try:
        config = read_config(resolve(origin.base) if alone else str(folder), part)
    except ModelError:
        if alone:
            return {}
        raise
    return _family(index).guide(config, origin.recipe.sampling.guidance_scale, 1)


def _pixels(pipeline: str, recipe: Recipe | None) -> int | None:
    """Return the size arguments of a call, as a pipeline's default may not be the upgrade's."""
    parameters = inspect.signature(model_class(pipeline).__call__).parameters
    return recipe.resolution if recipe is not None and {"height", "width"} <= set(parameters) else None


def _family(index: dict[str, Any]) -> Any:
    """Return the family of the pipeline's transformer or U-Net."""
    part = component_in(index)
    assert part is not None
    return family_by_class(index[part][1])
