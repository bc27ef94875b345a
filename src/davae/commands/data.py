"""`davae data`: what is in a source, and what training would see of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davae.commands.options import (
    CaptionColumn,
    CaptionKey,
    Enlarge,
    ImageColumn,
    Json,
    LabelColumn,
    LabelKey,
    Options,
    chosen_data,
    typed_source,
    write_json,
)
from davae.errors import DataError, RecipeError

if TYPE_CHECKING:
    from davae.data.summary import Summary


def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", callback=typed_source, help="A folder, shards, tables or a dataset id, as --data takes it."
        ),
    ],
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Pixels that train; without it images of every size are taken.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Take options, resolution, buckets and the model from this recipe.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Count captions that are cut by this model's own tokenizers.")
    ] = None,
    step: Annotated[
        int, typer.Option(min=1, help="Pixels of a token, for data.buckets; 32 is SD3.5's at scale 2.")
    ] = 32,
    show: Annotated[
        int | None, typer.Option(min=1, help="Write this many images as training would see them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for --show.")] = None,
    caption_key: CaptionKey = None,
    caption_column: CaptionColumn = None,
    label_key: LabelKey = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    enlarge: Enlarge = None,
    set: Options = None,
    json: Json = None,
) -> None:
    """Summarise a data source: images, captions, classes, sizes, what is left out and why.

    `davae data photos/ --resolution 1024`

    `davae data 'shards/{000..099}.tar' --caption-key caption --show 16 --out shown --json data.json`

    Of a remote set the first shard or the first rows are read. Headers are read, and captions; pixels only with --show.
    """
    from davae.console import table
    from davae.dataset.look import check_show, look_at, model_of, recipe_step
    from davae.recipes import BaseRecipe, Recipe, load_recipe

    start, known = None, {"resolution": resolution, "step": step}
    resolved = None if recipe is None else load_recipe(recipe)
    if resolved is not None:
        start = resolved.stage2_data if isinstance(resolved, Recipe) else resolved.data
        known["resolution"] = resolution or resolved.resolution
    options = chosen_data(source, set, locals(), start)
    check_show(show, out)
    if options.buckets is not None and isinstance(resolved, (Recipe, BaseRecipe)):
        known["step"] = recipe_step(resolved)
    if options.buckets is not None and known["resolution"] is None:
        raise RecipeError("data.buckets: the resolution is missing; give --resolution")
    summary = look_at(options, **known, limits=model_of(model, resolved), show=show, out=out)
    write_json(json, summary.as_dict())
    table("Data", ["", "found"], [list(row) for row in summary.rows()], right=False)
    _finish(source, summary, out)


def _finish(source: str, summary: Summary, out: Path | None) -> None:
    from davae.console import console

    if out is not None:
        console.print(f"{out}", markup=False)
    if not summary.images and not summary.partial:
        raise DataError(f"{source}: none of {summary.found} images can be used; mend what is left out above")
