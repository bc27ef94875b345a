"""Run Python in a process of its own that does not wait for torch to be imported: it is forked from one that has.

`start` and `run` take the words that follow `python`: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`. The process they are
forked from (one for each test process) has imported davae and has computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = (
    "davae.runs.report",
    "davae.cli",
    "davae.commands.upgrade",
    "davae.lab.bench.growth",
    "davae.lab.bench.stages",
    "davae.lab.bench.vae",
    "davae.runs.upgrade",
    "davae.sample.generate",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "matplotlib.pyplot",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def start(words: list[str], log: Path, cwd: Path | None = None, **environment: str) -> BaseProcess:
    """Start a process; what it prints is written to `log`. Its `exitcode` is negative after a signal."""
    process = _context.Process(
        target=_begin, args=(words, str(log), str(cwd or Path.cwd()), environment), daemon=False
    )
    process.start()
    return process


def run(words: list[str], log: Path, cwd: Path | None = None, **environment: str) -> str:
    """Run to the end and return what was printed; fail with its last lines when the exit status is not 0."""
    return finish([start(words, log, cwd, **environment)], log)


def run_two(words: list[str], log: Path, **environment: str) -> str:
    """Run in two processes of one launch, as accelerate's launcher starts them on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", **environment}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return finish([start(words, log, **shared, **rank) for rank in ranks], log)


def finish(processes: list[BaseProcess], log: Path, seconds: float = 300) -> str:
    """Wait for processes and return what they printed.

    Raises:
        AssertionError: one of them ended with another exit status than 0, or not in time.
    """
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
    printed = log.read_text(errors="replace")
    assert [process.exitcode for process in processes] == [0] * len(processes), printed[-3000:]
    return printed


def _begin(words: list[str], log: str, cwd: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(cwd)
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<example>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
