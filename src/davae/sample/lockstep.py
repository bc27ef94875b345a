"""Calls of a pipeline that meet at every step, each for a few windows of one canvas."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, cast

import torch

Given = TypeVar("Given")
Answer = TypeVar("Answer")
Exchange = Callable[[Given], Answer]


class Left(BaseException):
    """Exit from a call that is not needed to its end, past every `except Exception`."""


class _Worker(Generic[Given, Answer]):
    """A call in a thread of its own that runs only while `resume` waits for it."""

    def __init__(self, call: Callable[[Exchange[Given, Answer]], None], threads: int):
        self._call, self._threads = call, threads
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._given: Given | None = None
        self._answer: Answer | None = None
        self._leave = False
        self.ended = False
        self._executor = ThreadPoolExecutor(1)
        self._result = self._executor.submit(self._run)

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)  # a new thread starts with the environment's number
        try:
            if not self._leave:
                self._call(self._exchange)
        except Left:
            return
        finally:
            self.ended = True
            self._stopped.release()

    def _exchange(self, given: Given) -> Answer:
        self._given = given
        self._stopped.release()
        self._go.acquire()
        if self._leave:
            raise Left
        return cast(Answer, self._answer)

    def resume(self, answer: Answer | None) -> Given | None:
        """Run until the call hands something in, which is returned, or ends, with its errors."""
        self._answer = answer
        self._go.release()
        self._stopped.acquire()
        if self.ended:
            self._result.result()
            return None
        return self._given

    def leave(self) -> None:
        """End the call where it waits."""
        if not self.ended:
            self._leave = True
            self._go.release()
        self._executor.shutdown(wait=True)


def together(
    calls: Sequence[Callable[[Exchange[Given, Answer]], None]], meet: Callable[[list[Given]], list[Answer]]
) -> None:
    """Run calls that all hand in something at every step and go on with the answers.

    Only one of them runs at a time. They begin in order and end in the reverse order, so that what each changes and
    restores on a shared model nests. A call may raise `Left` once it has nothing more to do.

    Args:
        calls: each gets a function to exchange what it has for its answer.
        meet: what all calls handed in -> an answer for each.

    Raises:
        RuntimeError: calls of different numbers of steps.
    """
    if len(calls) == 1:

        def alone(given: Given) -> Answer:
            return meet([given])[0]

        with contextlib.suppress(Left):
            calls[0](alone)
        return
    workers = [_Worker[Given, Answer](call, torch.get_num_threads()) for call in calls]
    try:
        given: list[Any] = [worker.resume(None) for worker in workers]
        while not all(worker.ended for worker in workers):
            if any(worker.ended for worker in workers):
                raise RuntimeError("windows of one image took different numbers of steps")
            answers, given = meet(given), [None] * len(workers)
            for number in reversed(range(len(workers))):
                given[number] = workers[number].resume(answers[number])
    finally:
        for worker in reversed(workers):
            worker.leave()
