"""Build a release, check it, and tag it. Nothing is uploaded.

    python scripts/release.py 0.2.0            # checks, builds into dist/, `twine check`, tag v0.2.0
    python scripts/release.py 0.2.0 --dry-run  # the checks alone

The version must be that of pyproject.toml and davae.__version__, and CHANGELOG.md must have a section for it with a date.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(version: str, root: Path = ROOT) -> list[str]:
    """Return the reasons against a release of a version, in the form of davae's messages."""
    found = []
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    code = re.search(r'__version__ = "(.*?)"', (root / "src/davae/__init__.py").read_text(encoding="utf-8"))
    cited = re.search(r"^version: (\S+)", (root / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    for file, value in (
        ("pyproject.toml", declared),
        ("src/davae/__init__.py", code and code[1]),
        ("CITATION.cff", cited and cited[1]),
    ):
        if value != version:
            found.append(f"{file}: version {value}; set it to {version}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.M):
        found.append(f"CHANGELOG.md: no section '## {version} (YYYY-MM-DD)'; rename 'Unreleased' and add the date")
    return found


def run(*words: str) -> str:
    """Run a program in the repository and return what it prints."""
    return subprocess.run(words, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    wrong = problems(given.version)
    if run("git", "status", "--porcelain").strip():
        wrong.append("git: uncommitted changes; commit them")
    if run("git", "tag", "--list", f"v{given.version}").strip():
        wrong.append(f"git: tag v{given.version} exists; use another version")
    if wrong or given.dry_run:
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 1 if wrong else 0
    run(sys.executable, "-m", "pip", "install", "-q", "build", "twine")
    run(sys.executable, "-m", "build", "--outdir", f"dist/{given.version}")
    files = sorted(str(path) for path in (ROOT / "dist" / given.version).iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    run("git", "tag", "-a", f"v{given.version}", "-m", f"davae {given.version}")
    sys.stdout.write(
        "\n".join([*files, f"tag v{given.version}; push it with: git push origin v{given.version}"]) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
