"""Options of image sources: the part of a recipe's section `data` that sources read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from davae.data.decoding import MAX_PIXELS, Floats
from davae.errors import DataError


@dataclass(frozen=True)
class SourceOptions:
    """Part of a recipe's section `data` that sources need, with the same meaning."""

    background: str = "white"
    max_pixels: int = MAX_PIXELS
    float_pixels: Floats = "refuse"
    caption_key: str | None = None
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    label_key: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    label_column: str | None = None
    split: str = "train"
    config: str | None = None
    streaming: bool = False
    limit: int | None = None

    @property
    def record_keys(self) -> dict[str, float]:
        """Return the keys of a `.json` that hold captions, with their weights."""
        return dict(self.caption_weights) or ({self.caption_key: 1.0} if self.caption_key else {})

    @property
    def names_columns(self) -> bool:
        """Return whether an option names a column of a table."""
        return self.caption_column is not None or self.label_column is not None

    def refuse(self, source: str, names: Iterable[str]) -> None:
        """Raise a DataError for an option that is set and that this source cannot use."""
        default = SourceOptions()
        for name in names:
            if getattr(self, name) != getattr(default, name):
                raise DataError(f"data.{name} has no meaning for {source}; leave it out")


TABLE_OPTIONS = ("caption_column", "label_column", "config", "streaming")
