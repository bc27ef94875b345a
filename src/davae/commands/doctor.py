"""`davae doctor`: what this installation has, and what is missing for which verb."""

from __future__ import annotations

from davae.commands.options import Json, write_json


def doctor(json: Json = None) -> None:
    """Check versions, device, memory, attention kernels, and what is missing for which verb.

    `davae doctor --json doctor.json`
    """
    from davae.console import console, table
    from davae.plan.installation import examine

    found = examine()
    write_json(json, found)
    table(
        "Versions",
        ["", ""],
        [[name, version or "missing"] for name, version in found["versions"].items()],
        right=False,
    )
    table("This machine", ["", ""], [[name.replace("_", " "), cell(value)] for name, value in found["machine"].items()],
          right=False)  # fmt: skip
    table(
        "Optional parts",
        ["for", "package", ""],
        [
            [one["for"], one["package"], "installed" if one["installed"] else one["install"]]
            for one in found["optional"]
        ],
        right=False,
    )
    for problem in found["problems"]:
        console.print(f"Problem: {problem}", markup=False, highlight=False)
    if not found["problems"]:
        console.print("No problem found.", highlight=False)


def cell(value: object) -> str:
    """Return a value as a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
