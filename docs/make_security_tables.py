"""Write the tables of attempts into docs/security.md from docs/results/security/*.json.

    python docs/make_security_tables.py

Each file holds the `command` that repeats it and one member whose values are rows: a kind and its counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "security.md"
RESULTS = ROOT / "docs" / "results" / "security"
TITLES = {
    "app": "The page",
    "kills": "`kill -9` at random moments",
    "fuzz": "Hostile files",
    "at_once": "One place, several commands at once",
    "operations": "Killed before file operations",
}
START, END = "<!-- attempts -->\n", "<!-- end of attempts -->\n"


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the first member whose values are all mappings: kind -> counts."""
    return next(
        value
        for value in found.values()
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values())
    )


def table(found: dict[str, Any]) -> str:
    """Return a Markdown table of whole numbers, a row a kind and a last row with the sums."""
    rows = rows_of(found)
    columns = list(dict.fromkeys(key for row in rows.values() for key, value in row.items() if type(value) is int))
    sums = {key: sum(row.get(key, 0) for row in rows.values()) for key in columns}
    lines = [["", *(key.replace("_", " ") for key in columns)], ["---", *["---:"] * len(columns)]]
    lines += [
        [kind, *(f"{row.get(key, 0):,}" for key in columns)] for kind, row in [*rows.items(), ("together", sums)]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load_lines(found: dict[str, Any]) -> str:
    """Return the sentences on load and memory of the page."""
    load, memory = found["load"], found["memory"]
    honest, visitor, rss = load["honest"], load["visitor"], memory["rss_mib"]
    return (
        f"{load['clients']} clients sent {load['requests_each']} requests each in {load['seconds']:.0f} s, half of them "
        f"attacks. Of {honest['attempts']:,} honest requests {honest['failed']} failed. A visitor who asked for the page "
        f"once a second meanwhile ({visitor['visits']} times) waited {visitor['longest_seconds']} s at most. Copies of the "
        f"victim's file: {found['victim_copies']}.\n\nResident memory over {memory['images']} drawn images, after "
        f"{memory['before_first_reading']} to warm up: {rss[0]:,.0f} MiB before, {rss[-1]:,.0f} MiB after "
        f"(a reading each quarter: {', '.join(f'{reading:,.0f}' for reading in rss[1:])}).\n"
    )


def section() -> str:
    """Return the part of the page between the two marks."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"### {TITLES.get(path.stem, path.stem)}\n\n`{found['command']}`\n\n{table(found)}\n")
        if path.stem == "app":
            parts.append(f"{load_lines(found)}\n")
    return "".join(parts)


def page_with_tables(text: str) -> str:
    """Return a page's text with the part between its marks replaced."""
    return re.sub(f"(?s){re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n{section()}{END}", text)


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
