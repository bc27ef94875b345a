"""Start-up on images in tars: bytes and seconds of a first and a second start.

Seconds are of the clock; on a machine that others use, too, those of the processor are the ones to compare.

`python benchmarks/data_start.py --images 100000 --json docs/results/data/start.json`
`python benchmarks/data_start.py --source OTHER_CHECKOUT/src --json before.json` measures another version.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SHARD = 10_000  # images in a shard
START = """
import json, sys, time
from pathlib import Path
import davae.dataset.opened as opened
from davae.recipes.sections import Data
def read():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
folder, run = Path(sys.argv[1]), Path(sys.argv[2])
began, before, worked = time.perf_counter(), read(), time.process_time()
data = Data(source=f"{folder}/*.tar", holdout=0.0)
if hasattr(opened, "open_images"):
    found = opened.open_pictures(data, 32, folder=run)
    found.keep(run)
else:
    found = opened.open_pictures(data, 32)
seconds, cpu = time.perf_counter() - began, time.process_time() - worked
result = {"images": len(found.train), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
print(json.dumps({**result, "bytes": read() - before}))
"""


def write_shards(folder: Path, images: int, size: int) -> int:
    """Write captioned PNGs of `size` bytes each, padded behind the image, and return all bytes."""
    from PIL import Image

    total = 0
    for first in range(0, images, SHARD):
        path = folder / f"{first // SHARD:05d}.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(first, min(first + SHARD, images)):
                buffer = io.BytesIO()
                Image.new("RGB", (64, 64), (number % 256, number // 256 % 256, number // 65536)).save(buffer, "PNG")
                parts = {"png": buffer.getvalue().ljust(size, b"\0"), "txt": f"image {number}".encode()}
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        total += path.stat().st_size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=40_000, help="bytes of an image file")
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src", help="version to measure")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = Path(scratch) / "shards", Path(scratch) / "run"
        folder.mkdir()
        run.mkdir()
        figures: dict[str, object] = {
            "images": chosen.images,
            "set_bytes": write_shards(folder, chosen.images, chosen.size),
        }
        settings = {**os.environ, "PYTHONPATH": str(chosen.source), "DAVAE_CACHE": f"{scratch}/cache"}
        for name in ("first", "second"):
            command = [sys.executable, "-c", START, str(folder), str(run)]
            done = subprocess.run(command, env=settings, check=True, capture_output=True, text=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
    text = json.dumps(figures, indent=2) + "\n"
    sys.stdout.write(text)
    if chosen.json is not None:
        chosen.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
