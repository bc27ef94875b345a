"""`-v` and `-q` of every verb, and the log file of a run."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import davae
from davae.errors import Interrupted

LOG = "log.txt"  # in a run folder
OURS = logging.getLogger("davae")
LIBRARIES = ("accelerate", "diffusers", "transformers", "huggingface_hub")


def set_verbosity(level: int) -> None:
    """Show more (1: messages of libraries, tracebacks), the usual (0), or warnings and results alone (-1)."""
    OURS.setLevel(logging.WARNING if level < 0 else logging.NOTSET)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if level > 0 else logging.ERROR)
    state.level = level


class _State:
    level = 0


state = _State()


class RunLog:
    """Messages of a run, kept until its folder is known, then appended to its `log.txt`."""

    def __init__(self) -> None:
        from logging.handlers import MemoryHandler  # brings sockets and pickle, which `--help` does not need

        self._kept = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None

    def open(self, folder: Path) -> None:
        """Begin to write into a run folder's log."""
        self._file = logging.FileHandler(folder / LOG, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.write(
            logging.INFO, f"davae {davae.__version__}, Python {platform.python_version()}, {platform.platform()}"
        )
        self._kept.setTarget(self._file)
        self._kept.flush()
        OURS.removeHandler(self._kept)
        OURS.addHandler(self._file)

    def write(self, level: int, text: str) -> None:
        """Write a line that is not shown."""
        if self._file is not None:
            self._file.handle(logging.LogRecord("davae", level, "", 0, "%s", (text,), None))


@contextmanager
def run_log() -> Iterator[RunLog]:
    """Yield the log of a run: davae's messages go into it, and the error or signal that ends the run."""
    log = RunLog()
    OURS.addHandler(log._kept)
    try:
        yield log
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
        log.write(logging.INFO if interrupted else logging.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        for handler in (log._kept, log._file):
            if handler is not None:
                OURS.removeHandler(handler)
                handler.close()
