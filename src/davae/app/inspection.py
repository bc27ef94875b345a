"""What an upgrade would bring for a model: the table of `davae inspect`."""

from __future__ import annotations

from davae.models.pipeline import ModelError, read_shapes
from davae.train.plan import token_plan
from davae.zoo import resolve


def inspection(model: str, resolution: int, scale: int) -> tuple[list[list[str]], str]:
    """(rows of name and value, a line with the bound) for a base model.

    Raises:
        ModelError: no such model, one that cannot be upgraded, or a resolution that does not divide.
    """
    try:
        plan = token_plan(read_shapes(resolve(model)), resolution, scale)
    except ValueError as error:
        raise ModelError(f"model {model}: {error}") from error
    rows = [[key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"]
            for key, value in plan.as_dict().items()]  # fmt: skip
    line = (
        f"At {resolution} pixels: {plan.upgraded_tokens:,} tokens instead of {plan.native_tokens:,}. "
        f"The transformer can become at most **{plan.bound:.2f}** times as fast."
    )
    return rows, line
