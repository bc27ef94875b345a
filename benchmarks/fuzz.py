"""Damaged and hostile files for every reader: each is read or refused with one error.

    python benchmarks/fuzz.py --minutes 10 --json docs/results/security/fuzz.json

Each input is a valid file of its kind with random bytes changed, cut, repeated or swapped for hostile words. A worker process
with bounded memory reads it below a folder of its own. A survival is an input that davae reads or refuses by a `DavaeError`;
anything else (another exception, more than five seconds, memory beyond the bound, a dead worker, a file written outside the
folder) is a fault, kept with its seed so that `--only DOOR --seed N` repeats it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SECONDS = 5.0
MEMORY = 3 << 30  # beyond what the worker holds when it starts
WORDS = [
    *(b"\xff", b"\x00", b"\n", b"{", b"[", b"]" * 50, b"[" * 5000, b"-1", b"99999999999999999999", b"1e999", b"NaN"),
    *(b"Infinity", b"null", b"true", b'"', b"../../x", b"/etc/passwd", b"pipe:touch x"),
    *(b"&a [*a]", b"!!python/name:os.system"),
    *(b"\\ud800", b"\xef\xbb\xbf", b"PK\x03\x04", b"%!PS\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"a" * 20_000),
    b"," * 500,
]  # fmt: skip


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Return a copy of a file with one to eight changes."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        place, size = dice.randrange(len(found) + 1), dice.choice((1, 1, 2, 8, 64, 1024))
        match dice.randrange(7):
            case 0:
                found[place : place + size] = dice.randbytes(size)
            case 1:
                del found[place : place + size]
            case 2:
                found[place:place] = dice.choice(WORDS)
            case 3:
                found[place : place + size] = dice.choice(WORDS)
            case 4:
                found[place:place] = found[place : place + size] * dice.choice((1, 2, 50))
            case 5 if place < len(found):
                found[place] ^= 1 << dice.randrange(8)
            case _:
                found = found[: max(0, place)] if dice.random() < 0.3 else found
    return bytes(found[: 4 << 20])


# -- doors: each makes valid files once, and reads a folder with one of them changed -----------------------------------


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def images() -> dict[str, bytes]:
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
    return {f"a.{'jp2' if kind == 'JPEG2000' else kind.lower()}": picture(kind) for kind in kinds}


def read_images(folder: Path) -> None:
    from davae.data.decoding import decode_image, header_size

    for path in folder.iterdir():
        header_size(path)
        decode_image(path)


def shards() -> dict[str, bytes]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(3):
            for name, data in (
                (f"{number}.png", picture("PNG")),
                (f"{number}.txt", b"text"),
                (f"{number}.cls", b"1"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {"a.tar": stream.getvalue()}


def read_source(path: Path, **options: Any) -> None:
    from davae.data.options import SourceOptions
    from davae.data.sources import open_source

    source = open_source(str(path), 8, SourceOptions(**options))
    for index in range(min(3, len(source))):
        source.size(index), source.load(index), source.label(index), source.key(index), source.identity(index)


def sidecars() -> dict[str, bytes]:
    values = {"caption": "a red rose", "other": ["a", "b"], "class": 3}
    return {"a.json": json.dumps(values).encode(), "a.txt": b"a caption", "a.cls": b"7"}


def read_sidecars(folder: Path) -> None:
    (folder / "a.png").write_bytes(picture("PNG"))
    read_source(folder)
    read_source(folder, caption_key="caption", label_key="class")
    read_source(folder, caption_weights={"caption": 1.0, "other": 2.0, "txt": 1.0})


def recipes() -> dict[str, bytes]:
    from davae.recipes import shipped_recipes

    return {f"{name}.yaml": shipped_recipes()[name].encode() for name in ("micro", "micro-base", "imagenette128-sr")}


def read_recipe(folder: Path) -> None:
    from davae.recipes import check_commands, dump_recipe, load_recipe

    for path in folder.iterdir():
        recipe = load_recipe(str(path), ["run.seed=3"])
        check_commands(recipe)
        dump_recipe(recipe)


def upgrades() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x"
        metadata = {
            "format": "davae-upgrade-1", "class": "SD3Transformer2DModel", "channels": "[8, 24]",
            "lora": '{"rank": 2, "alpha": null}', "vae": '{"id": null, "path": "vae"}',
        }  # fmt: skip
        save_file({"a.weight": torch.ones(4, 3), "b.lora_A.weight": torch.zeros(2, 3)}, path, metadata)
        return {"upgrade.safetensors": path.read_bytes()}


def read_upgrades(folder: Path) -> None:
    from davae.publish.assemble import read_details, read_metadata, read_upgrade

    path = folder / "upgrade.safetensors"
    read_details(path, read_metadata(path))
    read_upgrade(path)


def models() -> dict[str, bytes]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}


def read_model(folder: Path) -> None:
    from davae.pretrained.autoencoders import load_autoencoder

    load_autoencoder(str(folder))


def configs() -> dict[str, bytes]:
    from davae.zoo import resolve

    base = Path(resolve("micro"))
    return {
        "model_index.json": (base / "model_index.json").read_bytes(),
        **{f"{part}%config.json": (base / part / "config.json").read_bytes() for part in ("transformer", "vae")},
        "scheduler%scheduler_config.json": (base / "scheduler" / "scheduler_config.json").read_bytes(),
    }


def read_configs(folder: Path) -> None:
    from davae.cost.flops import meta_detail_vae, meta_transformer
    from davae.pretrained.distilled import distilled
    from davae.pretrained.open import load_scheduler
    from davae.pretrained.shapes import read_shapes

    for path in list(folder.iterdir()):
        if "%" in path.name:
            part, name = path.name.split("%")
            (folder / part).mkdir(exist_ok=True)
            path.rename(folder / part / name)
    shapes = read_shapes(str(folder))
    load_scheduler(str(folder))
    distilled(str(folder))
    meta_transformer(shapes)
    meta_detail_vae(shapes, shapes.channels, 2)


def prompts() -> dict[str, bytes]:
    rows = [{"prompt": "a red rose", "Category": "x"}, {"prompt": "a cat", "tag": "y"}]
    return {
        "a.txt": b"a red rose\na cat\n",
        "a.tsv": b"Prompt\tCategory\na red rose\tx\n",
        "a.csv": b'prompt,seed\n"a red, rose",1\n',
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "a.json": json.dumps({"1": rows[0], "2": rows[1]}).encode(),
    }


def read_prompt_files(folder: Path) -> None:
    from davae.data.prompts import read_prompts

    for path in folder.iterdir():
        read_prompts(path)


def arrays() -> dict[str, bytes]:
    stream = io.BytesIO()
    np.savez(stream, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
    return {"a.npz": stream.getvalue(), "b.npz": packed.getvalue()}


def read_arrays(folder: Path) -> None:
    for path in folder.iterdir():
        read_source(path)


def checkpoints() -> dict[str, bytes]:
    stream = io.BytesIO()
    torch.save({"model": {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}}, stream)
    return {"a.pt": stream.getvalue()}


def read_checkpoints(folder: Path) -> None:
    from davae.convert.checkpoints import load_state
    from davae.data.latent_cache.import_shards import read_statistics

    load_state(folder / "a.pt")
    read_statistics(folder / "a.pt", 3)


DOORS: dict[str, tuple[Callable[[], dict[str, bytes]], Callable[[Path], None]]] = {
    "images": (images, read_images),
    "shards": (shards, lambda folder: read_source(folder / "a.tar")),
    "captions and JSON": (sidecars, read_sidecars),
    "recipes": (recipes, read_recipe),
    "upgrade files": (upgrades, read_upgrades),
    "models": (models, read_model),
    "configs": (configs, read_configs),
    "prompt files": (prompts, read_prompt_files),
    "arrays": (arrays, read_arrays),
    "checkpoints": (checkpoints, read_checkpoints),
}
WHOLE = {"models", "configs", "captions and JSON"}  # all files lie there, one of them changed


# -- one input ---------------------------------------------------------------------------------------------------------


def attempt(door: str, files: dict[str, bytes], seed: int, root: Path) -> str:
    """Read one changed file, and return "" if davae read or refused it, else the fault."""
    from davae.errors import DavaeError

    dice = random.Random(f"{door} {seed}")
    name = dice.choice(sorted(files))
    outside = root / "outside"
    outside.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        for other in files if door in WHOLE else (name,):
            (folder / other).write_bytes(mutated(files[other], dice) if other == name else files[other])
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            DOORS[door][1](folder)
        except DavaeError as error:
            if "\n" in str(error) and len(str(error)) > 4000:
                return f"a message of {len(str(error))} characters"
        except TooLong:
            return f"more than {SECONDS:.0f} s"
        except Exception as error:  # noqa: BLE001 - whatever else is a fault, and counted
            last = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in last if "/davae/" in frame.filename] or last
            return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:120]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        strays = [path for path in root.iterdir() if path.name not in (Path(scratch).name, "outside", "cache")]
        strays += list(outside.iterdir())
    return f"wrote {strays[0].name} outside its folder" if strays else ""


class TooLong(BaseException):
    """An input that takes too long, raised so that no handler swallows it."""


def _alarm(number: int, frame: Any) -> None:
    raise TooLong


def work(door: str, seeds: Iterator[int], until: float, pipe: Any) -> None:
    """Read inputs until the time is over, and send each before it is read and its result after."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    signal.signal(signal.SIGALRM, _alarm)
    files = DOORS[door][0]()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.chdir(root)
        os.environ["DAVAE_CACHE"] = str(root / "cache")
        for seed in seeds:
            if time.monotonic() > until:
                break
            pipe.send((seed, None))
            pipe.send((seed, attempt(door, files, seed, root)))
    pipe.send((-1, ""))


def fuzz(door: str, seconds: float, first: int = 0, most: int = 10**9) -> dict[str, Any]:
    """Read changed files by one reader for a time, and return counts and faults with seeds."""
    context = get_context("fork")
    until, seed = time.monotonic() + seconds, first
    tried = 0
    faults: dict[str, dict[str, int]] = {}
    while time.monotonic() < until and tried < most:
        here, there = context.Pipe()
        process = context.Process(
            target=work, args=(door, iter(range(seed, first + most)), until, there), daemon=True
        )
        process.start()
        there.close()
        fault = ""
        try:
            while True:
                if not here.poll(SECONDS * 3 + 20):
                    fault = "the worker does not answer"
                    break
                now, result = here.recv()
                if now < 0:
                    break
                seed = now
                if result is not None:
                    tried += 1
                    if result:
                        faults.setdefault(result, {"seed": now, "times": 0})["times"] += 1
                    seed = now + 1
        except EOFError:
            fault = "the worker died"
        if fault:
            tried += 1
            faults.setdefault(fault, {"seed": seed, "times": 0})["times"] += 1
            seed += 1
        process.kill()
        process.join()
        if not fault and (time.monotonic() >= until or tried >= most):
            break
    return {"attempts": tried, "survived": tried - sum(one["times"] for one in faults.values()), "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", choices=list(DOORS), action="append")
    parser.add_argument("--seed", type=int, default=0, help="first seed of every door")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = given.only or list(DOORS)
    from davae.cli import _quiet_libraries
    from davae.pretrained import distilled  # noqa: F401 - imported once, before the workers fork
    from davae.publish import assemble as export  # noqa: F401

    _quiet_libraries()
    torch.set_num_threads(1)
    found = {}
    for door in chosen:
        found[door] = fuzz(door, given.minutes * 60 / len(chosen), given.seed)
        print(f"{door}: {found[door]['survived']} of {found[door]['attempts']} survived", flush=True)
        for fault, where in found[door]["faults"].items():
            print(f"  seed {where['seed']}, {where['times']} times: {fault}", flush=True)
    totals = {key: sum(one[key] for one in found.values()) for key in ("attempts", "survived")}
    figures = {
        "command": f"python benchmarks/fuzz.py --minutes {given.minutes:g}",
        "seed": given.seed,
        **totals,
        "doors": found,
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if totals["attempts"] == totals["survived"] else 1)


if __name__ == "__main__":
    main()
