"""A merge gets a time limit that is kept, and a second chance where that can help."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from toolkit.errors import MeldkitError, MergeError, RunError

ResultT = TypeVar("ResultT")

# A merge that ran out of memory or met a disk that failed is tried again after this time, then after twice as long, ...
FIRST_PAUSE_SECONDS = 0.2
# How long after its deadline a merge of several ranks may take to agree that it failed.
GRACE_SECONDS = 10.0
# What torch's allocator on the CPU says; it raises RuntimeError.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class Deadline:
    """When a merge must be over.

    Args:
        seconds: from now.
        what: is merged, for the message.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds, self._what = seconds, what
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds, 0 or more."""
        return max(self._end - time.monotonic(), 0.0)

    def check(self, *_: object) -> None:
        """Raises MergeError once the time is over; takes any arguments, so that it can be a progress callback."""
        if not self.remaining():
            raise self.passed()

    def passed(self) -> MergeError:
        return MergeError(
            f"{self._what}: not done after {self._seconds:g} s, and given up",
            hint="--merge-timeout gives it more time",
        )


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: memory that was short, a disk or network that failed, also where a merge
    method met it. What the states or the options hold stays as it is, so other MeldkitErrors are final."""
    if isinstance(error, MergeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def attempt(
    function: Callable[[Deadline], ResultT],
    *,
    what: str,
    max_attempts: int,
    timeout_seconds: float,
    is_spread: bool = False,
) -> tuple[ResultT, int]:
    """Call ``function`` until it returns, up to ``max_attempts`` times, within ``timeout_seconds`` in all.

    It runs in a thread of its own, which is left behind when the time is over: it finds out at its next
    ``deadline.check()``.

    Args:
        is_spread: ranks do it together. One that is late is waited for a little longer, so that all ranks can agree on
            what went wrong and stay in step.

    Returns:
        What it returned, and the number of attempts.

    Raises:
        MeldkitError: that it raised, at once.
        MergeError: other errors, after the last attempt; or the time is over.
        RunError: the time is over and ranks did not agree on it: they are out of step, and the run cannot go on.
    """
    deadline = Deadline(timeout_seconds, what)
    for number in range(1, max_attempts + 1):
        run = _Run(function, deadline)
        if not run.finished(deadline.remaining() + (2 * GRACE_SECONDS if is_spread else 0.0)):
            passed = deadline.passed()
            raise (
                RunError(f"{passed.message}; the ranks are out of step", hint=passed.hint)
                if is_spread
                else _tried(passed, number)
            )
        if run.error is None:
            return run.result, number
        can_go_on = is_transient(run.error)
        if isinstance(run.error, MeldkitError) and not can_go_on:
            raise _tried(run.error, number)
        if not can_go_on or number == max_attempts:
            tried = "1 attempt" if number == 1 else f"{number} attempts"
            text = f"{what}: failed after {tried}: {type(run.error).__name__}: {run.error}"
            raise _tried(MergeError(text), number) from run.error
        _free_memory()
        time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (number - 1), deadline.remaining()))
    raise ValueError(f"max_attempts is {max_attempts}; at least 1 is needed")


def _tried(error: MeldkitError, num_attempts: int) -> MeldkitError:
    if isinstance(error, MergeError):
        error.num_attempts = num_attempts
    return error


class _Run(Generic[ResultT]):
    """One call in a thread."""

    result: ResultT

    def __init__(self, function: Callable[[Deadline], ResultT], deadline: Deadline) -> None:
        self.error: BaseException | None = None
        self._function, self._deadline = function, deadline
        # The current device belongs to a thread.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._call, name="merge", daemon=True)
        self._thread.start()

    def finished(self, timeout_seconds: float) -> bool:
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _call(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with torch.no_grad():
                self.result = self._function(self._deadline)
        except BaseException as error:  # raised again by the thread that waits
            self.error = error


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
