"""A computation in a thread of its own, whose reports reach the page while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

Report = Callable[[Any], None]


def streamed(work: Callable[[Report], None], stop: threading.Event) -> Iterator[Any]:
    """Run a function in a thread and give its reports as they come.

    Nothing waits for the thread where the visitor leaves: `stop` is set, and the work ends at its next look at it.

    Args:
        work: called with the function that takes its reports.
        stop: event that ends the work.

    Raises:
        Exception: of the work, after its reports.
    """
    reports: SimpleQueue[Any] = SimpleQueue()
    ended = object()
    pool = ThreadPoolExecutor(1)
    task = pool.submit(work, reports.put)
    task.add_done_callback(lambda _: reports.put(ended))
    pool.shutdown(wait=False)
    try:
        yield from iter(reports.get, ended)
    except GeneratorExit:
        stop.set()
        raise
    task.result()
