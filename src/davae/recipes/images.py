"""Sections on the images of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from davae.recipes.fields import Fraction, Name, PositiveInt, Section, Workers


class Buckets(Section):
    """Aspect ratios next to the square, at its token count (`davae.data.buckets`)."""

    max_ratio: Annotated[float, Field(ge=1.0)] = Field(
        default=4.0, description="Longest over shortest side of a bucket."
    )
    tokens: Literal["exact", "at_most"] = Field(
        default="exact",
        description="`exact`: buckets of the square's token count. `at_most`: 95 to 100 % "
        "of it, with many more ratios.",
    )


class Data(Section):
    """Source and preparation of images (`davae.data.sources`, docs/data.md)."""

    source: Name = Field(
        default="openmoji",
        description="`openmoji`, a folder, shards or parquet files (also by URL), or a Hugging Face dataset id.",
    )
    holdout: Fraction = Field(
        default=0.1,
        description="Share of images kept out of training, chosen by a hash of each name. "
        "With 0 the report shows training images.",
    )
    limit: PositiveInt | None = Field(default=None, description="Images to use at most, spread over the whole set.")
    flip: bool = Field(default=False, description="Mirror images at random.")
    crop: Literal["center", "random"] = Field(
        default="center", description="Part that is kept of an image of another aspect ratio."
    )
    buckets: Buckets | None = Field(
        default=None, description="Aspect ratios next to the square. Without it every image is cut to a square."
    )
    enlarge: bool = Field(
        default=False,
        description="Prepare images as ADM does, which enlarges small ones. Otherwise small images are left out.",
    )
    background: str = Field(default="white", description="Colour behind transparent pixels.")
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = Field(
        default=89_478_485, description="Refuse images with more pixels."
    )
    float_pixels: Literal["refuse", "unit"] = Field(
        default="refuse", description="`unit` reads floats as 0 (black) to 1 (white)."
    )
    caption_key: Name | None = Field(
        default=None,
        description="Key of the `.json` next to an image that holds the caption. Without "
        "it: the `.txt`, then `text`, `caption` or `prompt`.",
    )
    caption_weights: dict[str, PositiveFloat] = Field(
        default={},
        description="Several captions and how often each is drawn: keys of the `.json` "
        "(`txt` is the `.txt`), or columns.",
    )
    label_key: Name | None = Field(default=None, description="Key of the `.json` with the class number.")
    image_column: Name = Field(default="image", description="Column of a table that holds images.")
    caption_column: Name | None = Field(
        default=None, description="Column of a table that holds captions. Without it: text, caption or prompt."
    )
    label_column: Name | None = Field(default=None, description="Column of a table that holds class numbers.")
    split: Name = Field(default="train", description="Split of a table, or of train/, val/, test/ in a folder.")
    config: Name | None = Field(default=None, description="Configuration of a Hugging Face dataset.")
    require_captions: bool = Field(
        default=True, description="Stop a text-to-image run whose captions are mostly empty or equal."
    )
    streaming: bool = Field(default=False, description="Copy `limit` images instead of the whole dataset.")
    num_workers: Workers | None = Field(
        default=None, description="Processes that read images. Without it: chosen from the machine's cores."
    )

    @model_validator(mode="after")
    def _options_fit(self) -> Data:
        if self.caption_weights and (self.caption_key or self.caption_column):
            raise ValueError("give caption_weights, or one caption_key or caption_column, not both")
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs limit: how many images to take from the stream")
        return self
