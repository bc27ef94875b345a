"""Plan memory, disk and hours of every shipped upgrade recipe.

    python benchmarks/phases.py                         # all of them, into docs/results/phases.json
    python benchmarks/phases.py flux1-dev-2k sana-2k    # these, the others stay as they are

The file is written after each recipe, and so is the line of the recipe's header that states what it takes. Exit status 1
where a phase does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from davae.plan.dry_run import plan
from davae.recipes import load_recipe, shipped_recipes
from davae.recipes.upgrade import Recipe

RESULT = Path(__file__).resolve().parents[1] / "docs/results/phases.json"
RECIPES = Path(__file__).resolve().parents[1] / "src/davae/recipes"


def upgrade_recipes() -> list[str]:
    """Return the names of the shipped recipes that upgrade a model."""
    return [name for name in shipped_recipes() if isinstance(load_recipe(name), Recipe)]


def header(found: dict[str, Any]) -> str:
    """Return the comment of a recipe's header that states what a run takes at its most."""
    phases = found["phases"]
    device = max(phase["device_gib"] for phase in phases)
    machine = max(phase["machine_gib"] for phase in phases)
    disk = sum(phase["disk_gib"] for phase in phases)
    return (
        f"# Planned for {found['gpus']} x {found['gpu']}: {device:.1f} GiB of each GPU, {machine:.0f} GiB of a machine's "
        f"main memory, {disk:,.{1 if disk < 10 else 0}f} GiB of disk (`--dry-run`)."
    )


def write_header(path: Path, line: str) -> None:
    """Put the line below the first comments of a recipe, in place of an earlier one."""
    lines = [text for text in path.read_text(encoding="utf-8").split("\n") if not text.startswith("# Planned ")]
    comments = next(number for number, text in enumerate(lines) if not text.startswith("#"))
    path.write_text("\n".join([*lines[:comments], line, *lines[comments:]]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; all shipped upgrade recipes by default")
    parser.add_argument("--json", type=Path, default=RESULT, help="the file to write or bring up to date")
    options = parser.parse_args()
    known = upgrade_recipes()
    unknown = [name for name in options.recipes if name not in known]
    if unknown:
        parser.error(f"recipes: {', '.join(unknown)}; use {', '.join(known)}")
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    too_large = 0
    for name in options.recipes or known:
        start = time.process_time()
        recipe = load_recipe(name)
        assert isinstance(recipe, Recipe)
        values = plan(recipe).as_dict()
        found[name] = {key: values[key] for key in ("gpu", "gpus", "gpu_gib", "phases")}
        options.json.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
        write_header(RECIPES / f"{name}.yaml", header(found[name]))
        print(f"{name}: {time.process_time() - start:.0f} s of CPU", flush=True)
        for phase in values["phases"]:
            if not phase["fits"]:
                too_large += 1
                print(f"  {phase['name']}: {phase['device_gib']:g} GiB of a GPU; {phase['remedy']}", flush=True)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
