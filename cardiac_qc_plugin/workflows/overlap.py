"""Several cases under way at a time: their networks in the caller's thread, reading and writing in others."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from cardiac_qc_plugin.bundle import BundlePredictor

__all__ = ["Overlap"]

T = TypeVar("T")
R = TypeVar("R")


def compute_on_one_core() -> None:
    """In this thread; ``torch.set_num_threads`` would decide for threads that start later, too."""
    torch.get_num_threads()  # the first call in a thread sets its number
    threadpool_limits(1, user_api="openmp")


class Overlap:
    """Work on two cases at a time: one is read, or its results are written, while a network works on the other.

    The networks of both run in the thread that waits for the results, all other threads compute on one core: OpenMP
    keeps threads of its own for every thread that computes, and as soon as they are more than there are cores they
    sleep at every barrier: a network takes twice as long in another thread than the main one (docs/performance.md).

    Args:
        predictors: bundles whose networks the cases use, and nobody else meanwhile.

    Example::

        >>> with Overlap([]) as overlap:
        ...     [(case, wait()) for case, wait in overlap.map(str.upper, ["a", "b", "c"])]
        [('a', 'A'), ('b', 'B'), ('c', 'C')]
    """

    def __init__(self, predictors: Sequence[BundlePredictor]) -> None:
        self.predictors = predictors
        self.requests: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self.open = threading.Lock()
        self.closed = False

    def __enter__(self) -> "Overlap":
        self.pool = ThreadPoolExecutor(2, "case", initializer=compute_on_one_core)
        self.before = [predictor.compute for predictor in self.predictors]
        for predictor in self.predictors:
            predictor.compute = self.compute
        return self

    def __exit__(self, *_: object) -> None:
        """After an interruption, cases under way end where they next need a network."""
        with self.open:
            self.closed = True
            while not self.requests.empty():
                if (request := self.requests.get()) is not None:
                    request[0].cancel()
        self.pool.shutdown(cancel_futures=True)
        for predictor, before in zip(self.predictors, self.before, strict=True):
            predictor.compute = before

    def map(self, work: Callable[[T], R], cases: Iterable[T]) -> Iterator[tuple[T, Callable[[], R]]]:
        """Each case, in order, with a function that waits for its result (and raises what the work raised)."""
        waiting: deque[tuple[T, Future[R]]] = deque()
        for case in cases:
            waiting.append((case, self.pool.submit(work, case)))
            if len(waiting) > 1:
                first, future = waiting.popleft()
                yield first, lambda future=future: self._result(future)
        for last, future in waiting:
            yield last, lambda future=future: self._result(future)

    def compute(self, work: Callable[[], R]) -> R:
        """Have the waiting thread do this, and wait for it."""
        request: Future[R] = Future()
        with self.open:
            if self.closed:
                raise CancelledError
            self.requests.put((request, work))
        return request.result()

    def _result(self, case: Future[R]) -> R:
        """Do what the cases ask for until this one has ended."""
        case.add_done_callback(lambda _: self.requests.put(None))
        while not case.done():
            if (asked := self.requests.get()) is None:
                continue
            request, work = asked
            try:
                request.set_result(work())
            except BaseException as error:
                request.set_exception(error)
                if not isinstance(error, Exception):  # the user's interruption, which is not the case's error
                    raise
        return case.result()
