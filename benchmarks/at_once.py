"""One command run several times at once with one `--out`.

Each process ends whole or with one line, and no partial file stays.

    python benchmarks/at_once.py --processes 3 --rounds 4 --json docs/results/security/at_once.json

The verbs are those of `kills.py`. The processes of a round begin within a few milliseconds of each other; in every second
round the place already holds what an earlier command wrote. What remains must be what one command alone leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from kill_resume import quiet
from kills import contents, faults, finish, place_of, prepare, remove, start

from davae.files.atomic import MADE_HERE


def start_into(command: list[str], words: Path) -> int:
    """Start a command whose standard error goes to a file, and return its process."""
    sys.stderr.flush()
    kept = os.dup(2)
    number = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 2)
    try:
        return start(command)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(number)


def outcome(status: int, words: str) -> str:
    """Return how a command ended: `done`, `one_line`, or `fault`."""
    lines = words.strip().splitlines()
    if status == 0:
        return "done"
    return "one_line" if status == 2 and len(lines) == 1 and lines[0].startswith("davae: ") else "fault"


def partials(out: Path) -> list[str]:
    """Return the partial files and folders next to and below a place."""
    near = [path for path in out.parent.glob(f".{out.name}*") if MADE_HERE.fullmatch(path.name)]
    below = [path for path in out.rglob("*") if MADE_HERE.fullmatch(path.name)] if out.is_dir() else []
    return [str(path.relative_to(out.parent)) for path in near + below]


def run_round(command: list[str], out: Path, processes: int, words: Path) -> dict[str, int]:
    """Run a command several times at once, and return how the processes ended."""
    files = [words / f"{number}.txt" for number in range(processes)]
    children = [start_into([*command, "--out", str(out)], file) for file in files]
    found = {"done": 0, "one_line": 0, "fault": 0}
    for child, file in zip(children, files, strict=True):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text = file.read_text(errors="replace")
        kind = outcome(status, text)
        found[kind] += 1
        if kind == "fault":
            print(f"left with {status}:\n{text[-3000:]}", flush=True)
        elif kind == "one_line":
            print(text.strip(), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="of each verb")
    parser.add_argument("--verbs", nargs="*", help="names of verbs; by default all")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    quiet()
    result: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        commands = prepare(place, 2)
        (place / "out").mkdir()
        for verb, command in commands.items():
            if arguments.verbs and verb not in arguments.verbs:
                continue
            out = place_of(verb, place / "out")
            finish(start([*command, "--out", str(out)]))
            expected = contents(out)
            remove(out)
            counts: dict[str, Any] = dict.fromkeys(
                ("processes", "done", "one_line", "fault", "not_whole", "partials_left"), 0
            )
            for number in range(arguments.rounds):
                found = run_round(command, out, arguments.processes, place)
                counts["processes"] += arguments.processes
                for kind, count in found.items():
                    counts[kind] += count
                held = contents(out)
                left, odd = partials(out), {n for n in expected if held.get(n, 0) != expected[n]}
                counts["not_whole"] += bool(faults(out) or odd or not found["done"])
                counts["partials_left"] += len(left)
                print(f"{verb}: {found}; {left or 'no partial'}; {sorted(odd)[:3] or 'as of one alone'}", flush=True)
                if number % 2:
                    remove(out)
            remove(out)
            result[verb] = counts
    words = ["--verbs", *map(shlex.quote, arguments.verbs)] if arguments.verbs else []
    options = f"--processes {arguments.processes} --rounds {arguments.rounds}"
    figures = {"command": " ".join(["python benchmarks/at_once.py", options, *words])}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**figures, "verbs": result}, indent=1) + "\n")
    bad = sum(counts["fault"] + counts["not_whole"] + counts["partials_left"] for counts in result.values())
    print(json.dumps(result))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
