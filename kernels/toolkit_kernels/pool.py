"""Our own threads over pieces of work: kernels release the interpreter lock, torch's own threads stay at one."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """A fixed number of threads; with one, everything runs in the caller.

    Args:
        num_threads: None for one a core.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or num_cores()
        self._executor = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def map(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
        """The results in the order of the items. The first error ends the work and is raised."""
        if self._executor is None or len(items) < 2:
            return [function(item) for item in items]
        results: list[ResultT | None] = [None] * len(items)
        source: Iterator[tuple[int, ItemT]] = iter(enumerate(items))

        def take_turns() -> None:
            while True:
                try:
                    index, item = next(source)  # atomic: enumerate's next runs under the interpreter lock
                except StopIteration:
                    return
                results[index] = function(item)

        futures = [self._executor.submit(take_turns) for _ in range(min(self.num_threads, len(items)))]
        try:
            self._join(futures)
        except BaseException:
            source = iter(())
            wait(futures)
            raise
        return results  # pyright: ignore[reportReturnType] - every index has been filled

    @staticmethod
    def _join(futures: Iterable[Future[None]]) -> None:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
