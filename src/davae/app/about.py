"""Facts about the model of a page, and its example prompts and images."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from davae.app.pair import Pair
from davae.app.roots import label
from davae.backbones.classes import class_count, example_classes, goes_by_class
from davae.data.openmoji import render
from davae.errors import RecipeError
from davae.evaluate.throughput import image_tokens
from davae.recipes import Recipe, load_recipe
from davae.zoo import SHIPPED, UPGRADES

PROMPTS = ("a red rose", "a lighthouse at sunset", "a cat on a blue sofa", "a bowl of fruit, oil painting")
FEW = 8  # examples
EXAMPLE_IMAGES = {"rose": "1F339", "pizza": "1F355", "frog": "1F438"}  # name -> file of OpenMoji
CREDIT = "Example images: OpenMoji, CC BY-SA 4.0."


def recipe_of(pair: Pair) -> Recipe | None:
    """Return the recipe that a model was upgraded by, None where its folder has none."""
    name = SHIPPED.get(pair.name, pair.name)
    file = name if name in UPGRADES else str(Path(pair.name) / "recipe.yaml")
    if name not in UPGRADES and not Path(file).is_file():
        return None
    try:
        recipe = load_recipe(file)
    except RecipeError:  # written by another version of davae
        return None
    return recipe if isinstance(recipe, Recipe) else None


def example_prompts(pair: Pair) -> list[str]:
    """Return a few prompts or classes that a model knows, at least one."""
    pipeline = pair.any
    if goes_by_class(pipeline):
        return example_classes(pipeline, FEW)
    recipe = recipe_of(pair)
    known = [] if recipe is None else [prompt for prompt in recipe.sampling.prompts if prompt.strip()]
    return known[:FEW] or list(PROMPTS)


def model_facts(pair: Pair) -> list[str]:
    """Return sentences about a model: its size, its tokens, its training data, its inputs."""
    pipeline, size = pair.any, pair.resolution
    if pair.upgraded is None:
        small = size // pair.scale
        lines = [f"It is a base model that draws {small} pixels with {image_tokens(pipeline, small):,} tokens."]
    else:
        lines = [f"It draws {size} pixels with {image_tokens(pipeline, size):,} tokens."]
        if pair.base is not None:
            native = image_tokens(pair.base, size)
            lines.append(f"Its base needs {native:,} tokens for {size} pixels; it was made for {size // pair.scale}.")
    lines.append(_takes(pipeline))
    recipe = recipe_of(pair)
    if recipe is not None:
        lines.append(f"It was trained on the images of '{label(recipe.data.source)}'.")
    return lines


def _takes(pipeline: Any) -> str:
    if goes_by_class(pipeline):
        return f"It draws {class_count(pipeline):,} classes."
    return "It takes prompts; those below are like the ones that it was trained on."


@lru_cache(8)
def example_image(name: str, pixels: int) -> Image.Image:
    """Return an example image on white.

    Args:
        name: a key of EXAMPLE_IMAGES.
        pixels: its side.
    """
    drawn = Image.fromarray(render(EXAMPLE_IMAGES[name], pixels))  # RGBA
    sheet = Image.new("RGB", drawn.size, "white")
    sheet.paste(drawn, mask=drawn)
    return sheet
