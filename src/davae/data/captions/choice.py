"""Which text goes with a picture: one caption, or one of several by weight; and its class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from davae.data.captions.texts import as_texts
from davae.data.decoding import MAX_PIXELS, Floats
from davae.errors import DataError

GUESSES = ("text", "caption", "prompt", "captions", "TEXT")  # columns tried where none is named


def usual_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys or columns that usually hold captions, the likeliest first, in any case."""
    known = list(keys)
    exact = [guess for guess in GUESSES if guess in known]
    return list(dict.fromkeys([*exact, *(key for guess in GUESSES for key in known if key.casefold() == guess)]))


@dataclass(frozen=True)
class SourceOptions:
    """The recipe's section `data`, as far as sources need it; the fields mean what they mean there."""

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
        """Keys of a `.json` that hold captions, with their weights."""
        return dict(self.caption_weights) or ({self.caption_key: 1.0} if self.caption_key else {})

    @property
    def names_columns(self) -> bool:
        """Whether an option names a column of a table."""
        return self.caption_column is not None or self.label_column is not None

    def refuse(self, source: str, names: Iterable[str]) -> None:
        """DataError when an option is set that this source cannot use."""
        default = SourceOptions()
        for name in names:
            if getattr(self, name) != getattr(default, name):
                raise DataError(f"data.{name} has no meaning for {source}; leave it out")


def choose(candidates: Mapping[str, Any], weights: Mapping[str, float], rng: np.random.Generator | None) -> str:
    """One caption of a record.

    Args:
        candidates: the record: each value a text, or a list of texts of which one is drawn evenly.
        weights: share of each key; those that the record lacks, or has empty, leave their share to the others.
        rng: draws; None takes the heaviest key and its first text.

    Returns:
        The caption, '' where the record has none.
    """
    found = {key: texts for key in weights if (texts := as_texts(candidates.get(key)))}
    if not found:
        return ""
    keys = list(found)
    key = max(keys, key=lambda k: weights[k])
    if rng is not None and len(keys) > 1:
        shares = np.asarray([weights[k] for k in keys])
        key = keys[int(rng.choice(len(keys), p=shares / shares.sum()))]
    texts = found[key]
    return texts[0] if rng is None or len(texts) == 1 else texts[int(rng.integers(len(texts)))]
