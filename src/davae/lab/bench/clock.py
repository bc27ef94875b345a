"""Timing rivals side by side, peak memory, and what machine it was."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from davae.evaluate.throughput import synchronise
from davae.train import monitor as observe

STATUS = Path("/proc/self/status")  # Linux alone has it


@dataclass(frozen=True)
class Spread:
    """Seconds of one contender: the median of its repeats, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def spread(seconds: list[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def gpu_rounds() -> int:
    """Warm-up of rounds so long that a CPU needs none; a GPU's first one loads its kernels."""
    return int(torch.cuda.is_available())


def race(timed_jobs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Spread]:
    """Time each contender `repeats` times, one after the other in every round, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in timed_jobs}
    for turn in range(-warmup, repeats):
        for name, work in timed_jobs.items():
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: spread(values) for name, values in seconds.items()}


def ratio(slow: Spread, fast: Spread) -> float:
    """How many times faster, by the medians."""
    return slow.median / fast.median


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a module's function returns when a fresh process calls it, with as many threads as this one.

    Where the system can, the process is forked from one that has imported torch and has computed nothing: it starts at once.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__, function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures ended with status {process.exitcode}") from None
    finally:
        process.join()


def _answer(sender: Any, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    sender.send(function(*arguments))


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes that work needs on top of what was there before it, in a process of its own.

    Args:
        prepare: a module's function; called with `arguments`, it returns the work to be measured.
    """
    return in_own_process(_grown, prepare, arguments)


def _grown(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    work = prepare(*arguments)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = _peak(reset=True)
    work()
    return _peak() - before


def _peak(reset: bool = False) -> int:
    """Highest resident bytes since the last reset. Linux alone can reset it; elsewhere it is that of the whole process."""
    if not STATUS.is_file():
        return int(observe.peak_memory(torch.device("cpu")) * 2**30)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def resident(kind: str) -> int:
    """Bytes of this process in memory by a name of Linux's: `RssAnon` its own, `RssFile` mapped files, `VmHWM` the peak.

    0 on other systems.
    """
    if not STATUS.is_file():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024
