"""Order of drawings and Stops: a Stop ends earlier drawings, never a later one."""

from __future__ import annotations

import itertools
import threading
from typing import Any

ARRIVAL = "x-davae-arrival"  # header by which the guard numbers the requests in their order
MOST = 1024  # visitors whose last Stop is kept; the queue is far shorter
_numbers = itertools.count(1)


def number_request(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a request's headers with its place in the order of all requests.

    No client can choose it.
    """
    kept = [(name, value) for name, value in headers if name.lower() != ARRIVAL.encode()]
    return [*kept, (ARRIVAL.encode(), str(next(_numbers)).encode())]


def arrival_of(request: Any) -> int:
    """Return the place of a request in the order of all, a new one where it passed no guard.

    Gradio calls handlers late and in any order, so that the time of a call does not order them.
    """
    headers = getattr(request, "headers", None)
    given = None if headers is None else headers.get(ARRIVAL)
    return next(_numbers) if given is None else int(given)


class Turns:
    """The drawings of all visitors, and the arrival until which each visitor stopped them.

    A visitor is a session, an arrival the place of a request in the order of all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped: dict[str, int] = {}
        self._begun: dict[str, dict[int, threading.Event]] = {}

    @property
    def busy(self) -> bool:
        """True while a visitor draws."""
        return bool(self._begun)

    def begin(self, visitor: str, arrival: int) -> threading.Event:
        """Return the event that ends a drawing, set already where a Stop arrived while it waited."""
        stop = threading.Event()
        with self._lock:
            self._begun.setdefault(visitor, {})[arrival] = stop
            if arrival < self._stopped.get(visitor, 0):
                stop.set()
        return stop

    def end(self, visitor: str, arrival: int) -> None:
        """Forget a drawing that has ended."""
        with self._lock:
            begun = self._begun.get(visitor, {})
            begun.pop(arrival, None)
            if not begun:
                self._begun.pop(visitor, None)

    def stop(self, visitor: str, arrival: int) -> bool:
        """Stop earlier drawings of a visitor, and return whether the visitor has no newer one."""
        with self._lock:
            before = self._stopped.pop(visitor, 0)  # the newest lie last
            self._stopped[visitor] = max(before, arrival)
            while len(self._stopped) > MOST:
                del self._stopped[next(iter(self._stopped))]
            begun = self._begun.get(visitor, {})
            for asked, stop in begun.items():
                if asked < arrival:
                    stop.set()
            return all(asked < arrival for asked in begun)
