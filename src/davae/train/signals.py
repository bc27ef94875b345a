"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def stop_on_signal(names: Sequence[str]) -> Iterator[list[int]]:
    """The named signals are kept in a list that the loop reads between steps."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _: received.append(got))
        for number in (getattr(signal, name) for name in names)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
