"""Types of a recipe's fields, with their bounds, and the base class of its sections."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# Upper bounds catch slips and hostile files before they take all memory; each is far above what any model takes.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Pixels = Annotated[int, Field(gt=0, le=16_384)]
Width = Annotated[int, Field(gt=0, le=65_536)]  # channels, heads, ranks
Layers = Annotated[int, Field(gt=0, le=1024)]
Batch = Annotated[int, Field(gt=0, le=65_536)]
SamplingSteps = Annotated[int, Field(gt=0, le=10_000)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Scale = Annotated[int, Field(ge=2, le=64)]
LARGEST = 1e30  # float32 still holds its square root times a large sum


def _plain_name(name: str) -> str:
    """Refuse a name that is more than one part of a path: run folders are called by it."""
    if not name or len(name) > 100 or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError("use a plain name of up to 100 letters without slashes; a run folder is called by it")
    return name


RecipeName = Annotated[str, AfterValidator(_plain_name)]


def _as_text(value: Any) -> Any:
    """Return the text of a number or date that YAML made of a name such as 2024 or 2024-05-01."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads it as {str(value).lower()}; put the name into quotes")
    return str(value) if isinstance(value, (int, date)) else value


Name = Annotated[str, BeforeValidator(_as_text)]  # of a file, folder or column


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _float32_holds_it(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and abs(number) > LARGEST:
                raise ValueError(f"use a number up to {LARGEST:g}")
        return value
