"""Compare what davae computes and shows with what an earlier commit did.

    python tests/golden.py write FILE
    python tests/golden.py compare FILE

Covers 4 steps of each stage of `micro` at one seed (metrics, upgrade file, pipeline), the help of every verb, the key of
every job of `davae reproduce`, `inspect` of five presets, and the public names. A restructuring must leave all of it as it
was. Takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRESETS = ("sd35-medium", "flux1-dev", "qwen-image", "dit-xl-2-256", "sdxl")
TABLES = ("table1", "table2", "table3", "table4", "table5", "tableS2")
SHORT = {
    "stage1.max_steps": 4,
    "stage2.max_steps": 4,
    "stage2.warmup_steps": 2,
    "stage2.lr_cycles": 1,
    "data.limit": 64,
    "cache.variants": 1,
    "report.holdout_pictures": 4,
    "sampling.steps": 2,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
}


def davae(*words: str) -> str:
    """Run a command and return its standard output, 80 columns wide."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "davae", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"davae {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def digest(path: Path) -> str:
    """Return a hash of a file; of tensors alone, by name, where it contains tensors."""
    whole = hashlib.sha256()
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        for name, values in sorted(load_file(path).items()):
            whole.update(name.encode() + str(values.dtype).encode() + str(values.shape).encode() + values.tobytes())
    else:
        whole.update(path.read_bytes())
    return whole.hexdigest()


def untimed(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl without the speed, which differs from run to run."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def training(folder: Path) -> dict[str, Any]:
    """Return metrics and digests of a short upgrade of `micro`."""
    run = folder / "run"
    davae("upgrade", "micro", "--out", str(run), *[word for k, v in SHORT.items() for word in ("--set", f"{k}={v}")])
    metrics = {p.relative_to(run).as_posix(): untimed(p) for p in sorted(run.rglob("metrics.jsonl"))}
    weights = {
        p.relative_to(run).as_posix(): digest(p)
        for p in sorted(run.rglob("*.safetensors"))
        if "checkpoints" not in p.parts
    }
    files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    return {"metrics": metrics, "weights": weights, "files": files}


def verbs() -> dict[str, str]:
    """Return the help of every verb and of the verbs below it."""
    from typer.main import get_command

    from davae import cli

    paths: list[tuple[str, ...]] = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        paths.append(path)
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, (*path, name))

    walk(get_command(cli.app), ())
    return {" ".join(path) or "davae": davae(*path, "--help") for path in paths}


def job_keys() -> dict[str, list[str]]:
    """Return the keys under which the results of `davae reproduce` are kept."""
    scales = ("micro", "gpu", "paper")
    homes = ("davae.lab.reproduce.jobs", "davae.lab.reproduce.choose", "davae.lab.reproduce.choose")
    module = next(importlib.import_module(home) for home in homes if _exists(home))
    return {
        f"{table} {scale}": [job.key for job in module.jobs(table, scale, None, [])]
        for table in TABLES
        for scale in scales
    }


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def inspections(folder: Path) -> dict[str, Any]:
    """Return the figures of `davae inspect` for the presets."""
    found = {}
    for preset in PRESETS:
        davae("inspect", preset, "--json", str(folder / f"{preset}.json"))
        found[preset] = json.loads((folder / f"{preset}.json").read_text())
    return found


def everything() -> dict[str, Any]:
    """Compute all parts."""
    import davae as library

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "public names": sorted(library.__all__),
            "help": verbs(),
            "job keys": job_keys(),
            "inspect": inspections(folder),
            "training": training(folder),
        }


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Return one line for each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in [*before, *(k for k in after if k not in before)]:
            here = f"{place} / {key}" if place else str(key)
            if key not in before or key not in after:
                lines.append(f"{here}: only {'after' if key in after else 'before'}")
            else:
                lines += differences(before[key], after[key], here)
        return lines
    return [] if before == after else [f"{place}: {str(before)[:200]!r} -> {str(after)[:200]!r}"]


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    found = everything()
    if options.action == "write":
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    lines = differences(json.loads(options.file.read_text()), json.loads(json.dumps(found)))
    sys.stdout.write("\n".join(lines) + "\n" if lines else "equal\n")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
