"""Verbs killed with `kill -9` at random moments.

No partial file may pass for a whole one, and the same command must end well.

    python benchmarks/kills.py --kills 20 --json docs/results/security/kills.json

Tiny models with random weights go through `upgrade`, `make-data`, `evaluate samples`, `export`, `convert` and `apply`, each
in a child process that the parent kills. After each kill every file and folder that has its final name is opened and compared
with its checksums. Then the same command runs to its end, and what it leaves must be what a run that was never killed leaves.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from kill_resume import pictures, quiet, recipe, tiny_base
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from davae import cli
from davae.backbones.lightning_dit import LightningDiT
from davae.errors import DataError, DavaeError
from davae.files.atomic import MADE_HERE
from davae.files.checksums import check_folder, check_tensor_sums
from davae.sample.class_conditional import ClassConditionalPipeline
from davae.train.run_folder import load_checkpoint

SIZES = {"input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
VOLATILE = {
    "report.html",
    "report.json",
    "timing.jsonl",
    "times.json",
    ".process.json",
    ".lock",
}  # not the same twice


def prepare(place: Path, steps: int) -> dict[str, list[str]]:
    """Write the inputs of all verbs, and return the command of each, without its `--out`."""
    tiny_base(place / "base")
    config = place / "base" / "vae" / "config.json"  # the pipeline draws with a shift
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.0, "scaling_factor": 1.0}))
    pictures(place / "pictures")
    values = recipe(place, steps).model_dump(mode="json", exclude_defaults=True)
    values["report"] = {"holdout_pictures": 2, "timing_repeats": 1}
    values["sampling"] = {"steps": 2, "prompts": ["a red square"]}
    (place / "tiny.yaml").write_text(yaml.safe_dump(values))
    (place / "prompts.txt").write_text("".join(f"a {word} square\n" for word in ("red", "blue", "green", "grey")))
    torch.manual_seed(0)
    model = LightningDiT(**SIZES).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, place / "official.safetensors"
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    ClassConditionalPipeline(vae.eval(), model).save_pretrained(place / "classes")
    vae.save_pretrained(place / "vae")
    upgrade = ["upgrade", str(place / "tiny.yaml")]
    finish(start([*upgrade, "--out", str(place / "run")]))
    finish(start(["export", str(place / "run"), "--as", "upgrade", "--out", str(place / "small")]))
    drawn = ["--resolution", "16", "--steps", "2", "--shard-size", "4", "--batch-size", "2", "--num", "12"]
    return {
        "upgrade": upgrade,
        "make-data": ["make-data", "--model", str(place / "base"), "--prompts", str(place / "prompts.txt"), *drawn],
        "evaluate samples": [
            "evaluate",
            "samples",
            "--pipeline",
            str(place / "classes"),
            "--num",
            "500",
            "--steps",
            "2",
        ],
        "export": ["export", str(place / "run"), "--as", "fused", "--dtype", "float32"],
        "convert": ["convert", "lightningdit", str(place / "official.safetensors"), "--vae", str(place / "vae")],
        "apply": ["apply", str(place / "small"), "--base", str(place / "base"), "--dtype", "float32"],
    }


def start(command: list[str]) -> int:
    """Start a davae command in a child process, and return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.argv, sys.stdout = ["davae", *command], io.StringIO()
        cli._quiet_libraries = lambda: None  # the parent has done so
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> None:
    """Wait for a command that is not killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise SystemExit(f"a command that was not killed left with {status}")


def files(out: Path) -> Iterator[Path]:
    """Yield what has its final name: no partial of a process, and nothing inside one."""
    for path in sorted(out.rglob("*") if out.is_dir() else [out]):
        inside = path.relative_to(out.parent).parts
        if path.is_file() and not any(MADE_HERE.fullmatch(part) for part in inside):
            yield path


def open_whole(path: Path) -> None:
    """Open a file as its reader does, to raise the error that a partial file causes."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
        check_tensor_sums(path, load_file(path), metadata, DataError, "")
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    elif path.suffix == ".tar":
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                assert len(stream.read()) == member.size
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl" and path.name != "timing.jsonl":
        for line in path.read_text().splitlines()[
            :-1
        ]:  # appended to: a kill may cut the last line, which readers drop
            json.loads(line)
    elif path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text())


def faults(out: Path) -> list[str]:
    """Return the files with a final name that are not whole."""
    found = []
    for path in files(out):
        try:
            open_whole(path)
            if path.name == "state.pt":
                load_checkpoint(path.parent)
            elif path.name == "checksums.json":
                check_folder(path.parent)
        except (DavaeError, OSError, ValueError, EOFError, AssertionError, RuntimeError, tarfile.TarError) as error:
            found.append(f"{path.relative_to(out.parent)}: {error}")
    return found


def contents(out: Path) -> dict[str, Any]:
    """Return everything that must be equal at the end: tensors, images, tables and logs."""
    found: dict[str, Any] = {}
    for path in files(out):
        name = path.relative_to(out).as_posix() if out.is_dir() else path.suffix
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]
        elif path.suffix == ".npz":  # whose entries are dated
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix in (".npy", ".tar", ".png"):
            found[name] = path.read_bytes()
        elif path.name not in VOLATILE and "checkpoints" not in path.parts:
            found[name] = None  # its name
    return found


def kill_one(command: list[str], out: Path, duration: float, moments: random.Random) -> str:
    """Start a command, kill it, and return its progress, empty if it had ended before."""
    child = start([*command, "--out", str(out)])
    moment = moments.uniform(0, duration)
    time.sleep(moment)
    if os.waitpid(child, os.WNOHANG) != (0, 0):
        return ""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"{moment / duration:.2f}"


def place_of(verb: str, folder: Path) -> Path:
    """Return what a verb writes in a folder."""
    return folder / ("drawn.npz" if verb == "evaluate samples" else "made")


def differing(expected: dict[str, Any], out: Path) -> list[str]:
    """Return the names of files that are not as expected, missing and extra ones included."""
    found = contents(out)
    return sorted(n for n in expected.keys() | found.keys() if expected.get(n, 0) != found.get(n, 0))


def remove(out: Path) -> None:
    """Remove what a command left, with the parts next to it."""
    for path in out.parent.glob(f"*{out.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of all verbs together")
    parser.add_argument("--steps", type=int, default=4, help="of each stage of the upgrade")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    quiet()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        commands = prepare(place, arguments.steps)
        result: dict[str, dict[str, Any]] = {}
        (place / "out").mkdir()
        for number, (verb, command) in enumerate(commands.items()):
            out = place_of(verb, place / "out")
            began = time.perf_counter()
            finish(start([*command, "--out", str(out)]))
            duration = time.perf_counter() - began
            expected = contents(out)
            remove(out)
            wanted = arguments.kills // len(commands) + (number < arguments.kills % len(commands))
            counts: dict[str, Any] = {"kills": 0, "moments": [], "half_written_taken_for_whole": 0, "ended_equal": 0}
            counts["ended_unequal"] = 0
            while counts["kills"] < wanted:
                moment = kill_one(command, out, duration, moments)
                if moment:
                    counts["kills"] += 1
                    counts["moments"].append(float(moment))
                    half = faults(out) if out.exists() else []
                    counts["half_written_taken_for_whole"] += bool(half)
                    print(
                        f"{verb}: killed at {moment} of its way; {half or 'all that has its name is whole'}",
                        flush=True,
                    )
                    if moments.random() < 0.5 and counts["kills"] < wanted:
                        continue  # killed again before it comes to its end
                    finish(start([*command, "--out", str(out)]))
                odd = differing(expected, out)
                counts["ended_unequal" if odd else "ended_equal"] += 1
                print(f"{verb}: run again to its end: {odd[:3] or 'equal to one never killed'}", flush=True)
                remove(out)
            remove(out)
            result[verb] = counts
    keys = ("kills", "half_written_taken_for_whole", "ended_equal", "ended_unequal")
    total = {key: sum(counts[key] for counts in result.values()) for key in keys}
    figures = {"command": f"python benchmarks/kills.py --kills {arguments.kills} --seed {arguments.seed}"}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**figures, "total": total, "verbs": result}, indent=1) + "\n")
    print(json.dumps(total))
    sys.exit(bool(total["half_written_taken_for_whole"] or total["ended_unequal"]))


if __name__ == "__main__":
    main()
