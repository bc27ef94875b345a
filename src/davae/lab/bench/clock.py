"""Time and memory of work that is measured, and the machine that it runs on."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from davae.evaluate.throughput import synchronise
from davae.train import monitor as observe

STATUS = Path("/proc/self/status")  # Linux alone has it


@dataclass(frozen=True)
class Spread:
    """Seconds of one job: the median of its repeats, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of measured seconds, one for each repeat."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def gpu_rounds() -> int:
    """Return the warm-up rounds of long work: none on a CPU, one on a GPU, to load kernels."""
    return int(torch.cuda.is_available())


def race(timed_jobs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Spread]:
    """Time every job `repeats` times, one after the other in every round.

    Drift of the machine affects all jobs alike.

    Args:
        timed_jobs: work by name.
        repeats: timed rounds.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed_jobs}
    for number in range(-warmup, repeats):
        for name, work in timed_jobs.items():
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: Spread.of(values) for name, values in seconds.items()}


def ratio(slow: Spread, fast: Spread) -> float:
    """Return the speed-up by the medians."""
    return slow.median / fast.median


def machine() -> dict[str, Any]:
    """Return the machine and the versions that figures were measured with."""
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
    """Return the result of a module's function, called in a fresh process with equal threads.

    Where the system can, the process is forked from one that has imported torch and computed nothing, which starts at once.

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


def added_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Return the bytes that work adds to the memory in use, measured in a process of its own.

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
    """Return the highest resident bytes since the last reset, which Linux alone supports."""
    if not STATUS.is_file():
        return int(observe.peak_memory_gib(torch.device("cpu")) * 2**30)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def resident(kind: str) -> int:
    """Return the bytes of this process in memory, 0 on systems other than Linux.

    Args:
        kind: Linux's name: `RssAnon` for its own, `RssFile` for mapped files, `VmHWM` for the peak.
    """
    if not STATUS.is_file():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024
