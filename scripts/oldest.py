"""Test with the oldest versions that pyproject.toml allows, in a fresh environment.

python scripts/oldest.py /tmp/davae-oldest             # installs a few GB, then minutes of tests
python scripts/oldest.py /tmp/davae-oldest --newest torch torchvision     # without the gigabytes of an old torch
python scripts/oldest.py /tmp/davae-oldest --print     # the versions alone
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "vae/test_models.py",
    "losses/test_losses.py",
    "recipes/test_recipes.py",
    "vae/test_autoencoders.py",
    "tasks/test_objectives.py",
    "train/test_loop.py",
)


def oldest(root: Path = ROOT, newest: Collection[str] = ()) -> list[str]:
    """Return each direct requirement at its lower bound, as `name==version`.

    Args:
        root: folder of pyproject.toml.
        newest: packages that pip may choose in any allowed version.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = []
    for requirement in project["dependencies"]:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no lower bound; give it one, as name>=1.2")
        pinned.append(requirement if match[1] in newest else f"{match[1]}=={match[2]}")
    return pinned


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--print", action="store_true", help="print the versions and stop")
    parser.add_argument("--newest", nargs="+", default=[], metavar="PACKAGE", help="packages that pip chooses")
    given = parser.parse_args()
    pinned = oldest(newest=given.newest)
    if given.print:
        sys.stdout.write("\n".join(pinned) + "\n")
        return 0
    venv.create(given.folder, with_pip=True, clear=True)
    python = str(given.folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--no-compile"]
    subprocess.run([*install, *pinned, "pytest", "-e", str(ROOT)], check=True)
    tests = [str(ROOT / "tests" / name) for name in CORE]
    return subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
