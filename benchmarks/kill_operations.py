"""Verbs killed before each of their file operations.

No partial file may pass for a whole one, and the same command must end well.

    python benchmarks/kill_operations.py --most 24 --json docs/results/security/operations.json

The verbs are those of `kills.py`. Every opening for writing, renaming, removing and making of a folder in the place of the
output counts as an operation, as Python's audit events report them. A verb with more than `--most` operations is killed
before that many of them, evenly spread; one that goes on where a killed one stopped may end before its turn. What is there
is opened and compared with its checksums after each kill; after every fourth one the same command runs to its end, on what
all the kills before it left.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_resume import quiet
from kills import contents, differing, faults, finish, place_of, prepare, remove, start

from davae import cli

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watched(place: Path, before: Callable[[], None]) -> None:
    """Call a function before each file operation below a place, for the rest of this process."""
    inside = str(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if os.fsdecode(arguments[0]).startswith(inside):
            before()

    sys.addaudithook(hook)


def run(command: list[str], place: Path, last: int) -> tuple[int, int]:
    """Run a command that is killed before an operation, and return (exit status, operations)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        done, code = 0, 1

        def before() -> None:
            nonlocal done
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            os.write(writer, b".")

        try:
            sys.argv, sys.stdout = ["davae", *command], io.StringIO()
            cli._quiet_libraries = lambda: None
            watched(place, before)
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        operations = len(stream.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), operations


def kill_verb(command: list[str], out: Path, most: int) -> dict[str, int]:
    """Kill a verb before each of its operations, and return the counts."""
    command = [*command, "--out", str(out)]
    status, operations = run(command, out.parent, -1)
    if status:
        raise SystemExit(f"a command that was not killed left with {status}")
    expected = contents(out)
    remove(out)
    counts = dict.fromkeys(("operations", "kills", "half_written_taken_for_whole", "ended_equal", "ended_unequal"), 0)
    counts["operations"] = operations
    chosen = sorted(
        {round(number * operations / most) for number in range(most)} if operations > most else range(operations)
    )
    for number, last in enumerate(chosen):
        status, _ = run(command, out.parent, last)
        counts["kills"] += status == -signal.SIGKILL
        half = faults(out) if out.exists() else []
        counts["half_written_taken_for_whole"] += bool(half)
        if half:
            print(f"before operation {last}: {half}", flush=True)
        if number % 4 == 3 or last == chosen[-1]:
            finish(start(command))
            odd = differing(expected, out)
            counts["ended_unequal" if odd else "ended_equal"] += 1
            if odd:
                print(f"before operation {last}, run again to its end: {odd[:5]}", flush=True)
            remove(out)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=24, help="kills of a verb")
    parser.add_argument("--verbs", nargs="*", help="names of verbs; by default all but upgrade")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    quiet()
    result: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        commands = prepare(place, 2)
        (place / "out").mkdir()
        for verb, command in commands.items():
            if verb not in (arguments.verbs or commands.keys() - {"upgrade"}):
                continue
            out = place_of(verb, place / "out")
            result[verb] = kill_verb(command, out, arguments.most)
            print(f"{verb}: {result[verb]}", flush=True)
            named = ["--verbs", *map(shlex.quote, arguments.verbs)] if arguments.verbs else []
            words = " ".join(["python benchmarks/kill_operations.py --most", str(arguments.most), *named])
            figures = {"command": words, "verbs": result}
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(row["half_written_taken_for_whole"] or row["ended_unequal"] for row in result.values()))


if __name__ == "__main__":
    main()
