"""Signals that stop a run at the next place where everything is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from davae.errors import Interrupted

_received: list[int] = []
_held = 0  # uses of `stop_on_signal` inside one another


@contextmanager
def stop_on_signal(names: Sequence[str]) -> Iterator[list[int]]:
    """Note the named signals in a list instead of dying by them.

    Uses inside one another share the list: a signal that comes between two stages, or in a stage's last step, is still
    there for the next. The outermost use forgets it at its end.
    """
    global _held
    owner = os.getpid()

    def note(number: int, _: object) -> None:
        if os.getpid() == owner:  # a forked worker of the data loader goes on: its parent ends it
            _received.append(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
        previous = {number: signal.signal(number, note) for number in (getattr(signal, name) for name in names)}
    _held += 1
    try:
        yield _received
    finally:
        _held -= 1
        if not _held:
            _received.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_stop(place: str) -> None:
    """Stop where a signal has asked for it.

    Args:
        place: what is being done, named in the message.

    Raises:
        Interrupted: a signal came; what was finished before is saved.
    """
    if _received:
        raise Interrupted(f"{place}: stopped, what is finished is saved; run the same command again to go on")


@contextmanager
def leave_on_signal() -> Iterator[None]:
    """Make the signals by which a cluster ends a job stop a verb as Ctrl-C does."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
