"""Time limits that are kept, second chances where they can help."""

import threading
import time

import pytest
import torch

from toolkit.errors import InputError, MergeError, RunError
from toolkit.rounds.merging import attempts
from toolkit.rounds.merging.attempts import Deadline, attempt


def run(function, *, max_attempts=3, timeout_seconds=60.0, **more):
    return attempt(
        function, what="merge x", max_attempts=max_attempts, timeout_seconds=timeout_seconds, **more
    )


class Failing:
    """Raises these errors one after another, and returns then."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self, deadline: Deadline) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes"),
    ],
)
def test_what_may_pass_is_tried_again(error):
    failing = Failing(error)
    assert run(failing) == ("done", 2)
    assert failing.calls == 2


def test_no_more_attempts_than_were_allowed():
    failing = Failing(*(OSError(f"number {n}") for n in range(5)))
    with pytest.raises(MergeError, match="merge x: failed after 2 attempts: OSError: number 1"):
        run(failing, max_attempts=2)
    assert failing.calls == 2


@pytest.mark.parametrize("error", [MergeError("NaN in a"), InputError("no such method"), ValueError("a bug")])
def test_what_stays_wrong_is_not_tried_again(error):
    failing = Failing(error)
    with pytest.raises((type(error), MergeError), match=str(error)):
        run(failing)
    assert failing.calls == 1


def test_the_time_is_kept_while_the_work_goes_on():
    go_on = threading.Event()
    started = time.monotonic()
    with pytest.raises(MergeError, match=r"merge x: not done after 0\.2 s"):
        run(lambda deadline: go_on.wait(30), timeout_seconds=0.2)
    assert time.monotonic() - started < 5
    go_on.set()


def test_the_work_finds_out_and_ends():
    ended = threading.Event()

    def work(deadline: Deadline) -> None:
        try:
            while True:
                time.sleep(0.01)
                deadline.check(1234)
        finally:
            ended.set()

    with pytest.raises(MergeError, match="not done after"):
        run(work, timeout_seconds=0.1)
    assert ended.wait(10)


def test_ranks_that_did_not_agree_are_out_of_step(monkeypatch):
    monkeypatch.setattr(attempts, "GRACE_SECONDS", 0.1)
    go_on = threading.Event()
    with pytest.raises(RunError, match="out of step") as caught:
        run(lambda deadline: go_on.wait(30), timeout_seconds=0.1, is_spread=True)
    assert not isinstance(caught.value, MergeError)  # which a loop may survive
    go_on.set()


def test_ranks_that_agree_a_little_late_stay_in_step():
    def late(deadline: Deadline) -> None:
        time.sleep(0.3)
        deadline.check()

    with pytest.raises(MergeError, match="not done after"):
        run(late, timeout_seconds=0.1, is_spread=True)
