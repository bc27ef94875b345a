"""Figures of an upgrade before it is trained: the table of `davae inspect`."""

from __future__ import annotations

from davae.plan.counted import inspected_figures


def inspection(model: str, resolution: int, scale: int) -> tuple[list[list[str]], str]:
    """Return the rows of name and value, and a line with the bound, for a base model.

    Args:
        model: name or folder.
        resolution: pixels of the upgraded image, each way.
        scale: pixels of the upgraded image over those of the base, each way.

    Raises:
        ModelError: no such model, one that cannot be upgraded, or a resolution that does not divide.
    """
    figures = inspected_figures(model, resolution, scale)
    rows = [
        [key.replace("_", " ").replace("picture", "image"), f"{value:{',.4g' if isinstance(value, float) else ','}}"]
        for key, value in figures.items()
        if isinstance(value, (int, float))
    ]
    line = f"At {resolution} pixels: {figures['upgraded_tokens']:,} tokens instead of {figures['native_tokens']:,}. "
    if "bound" in figures:
        line += f"The transformer can become at most **{figures['bound']:.2f}** times as fast. "
    return rows, line + " ".join(f"{note}." for note in figures["notes"])
