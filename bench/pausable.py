"""Pausing a call between steps: a greenlet against a thread with a hand-over lock.

    python bench/pausable.py [--out bench/results/pausable.json]

Eight participants take turns; each step is a chain of matrix products that torch spreads over its OpenMP workers.
Both ways do the same steps, alternating A B B A, and must give the same bits. Reported: medians of microseconds a step,
the ratio, the cost of a switch with an empty step, and the threads of the process while all participants are alive
(each Python thread that runs a parallel region gets an OpenMP pool of its own).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from toolkit.training.pausable import PausableCall

NUM_PARTICIPANTS = 8
NUM_STEPS = 60
REPEATS = 5


class ThreadCall:
    """The same interface on a thread and two semaphores."""

    def __init__(self, function) -> None:
        self._mine, self._callers = threading.Semaphore(0), threading.Semaphore(0)
        self.finished = False

        def body() -> None:
            self._mine.acquire()
            function()
            self.finished = True
            self._callers.release()

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        self._mine.release()
        self._callers.acquire()

    def pause(self) -> None:
        self._callers.release()
        self._mine.acquire()


def turns(call_class, size: int) -> tuple[float, torch.Tensor]:
    """Seconds a step over all participants, and their results."""
    results: list[torch.Tensor] = [torch.empty(0)] * NUM_PARTICIPANTS
    calls: list = [None] * NUM_PARTICIPANTS

    def participant(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(size, size, generator=generator) / max(size, 1) ** 0.5 if size else None
        value = weight
        for _ in range(NUM_STEPS):
            if weight is not None and value is not None:
                value = value @ weight
            calls[index].pause()
        results[index] = value if value is not None else torch.zeros(1)

    for index in range(NUM_PARTICIPANTS):
        calls[index] = call_class(lambda index=index: participant(index))
    began = time.perf_counter()
    while not all(call.finished for call in calls):
        for call in calls:
            if not call.finished:
                call.resume()
    seconds = (time.perf_counter() - began) / (NUM_PARTICIPANTS * NUM_STEPS)
    return seconds, torch.stack(results)


def threads_in_use(call_class, size: int) -> int:
    """Threads of the process while all participants are alive and have made a step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size or 1, size or 1, generator=generator)
    calls: list = []

    def participant(index: int) -> None:
        for _ in range(2):
            torch.mm(weight, weight)
            calls[index].pause()

    calls += [call_class(lambda index=index: participant(index)) for index in range(NUM_PARTICIPANTS)]
    for call in calls:
        call.resume()
    count = psutil.Process().num_threads()
    while not all(call.finished for call in calls):
        for call in calls:
            if not call.finished:
                call.resume()
    return count


def measure_one(kind: str, size: int) -> dict[str, float]:
    """In a process of its own, so that pools of the other way do not count."""
    call_class = {"greenlet": PausableCall, "thread": ThreadCall}[kind]
    turns(call_class, size)
    seconds, results = turns(call_class, size)
    return {
        "step_microseconds": seconds * 1e6,
        "num_threads": threads_in_use(call_class, size),
        "checksum": results.double().sum().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_one(arguments.one[0], int(arguments.one[1]))))
        return
    report: dict = {
        "command": "python bench/pausable.py",
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
    }
    report |= {
        "machine": platform.machine(),
        "participants": NUM_PARTICIPANTS,
        "steps": NUM_STEPS,
        "sizes": {},
    }
    for size in (0, 384):
        runs: dict[str, list] = {"greenlet": [], "thread": []}
        for repeat in range(REPEATS):
            order = ["greenlet", "thread"] if repeat % 2 == 0 else ["thread", "greenlet"]
            for kind in order:
                command = [sys.executable, __file__, "--one", kind, str(size)]
                runs[kind].append(json.loads(subprocess.check_output(command)))
        assert len({run["checksum"] for kind in runs for run in runs[kind]}) == 1, (
            "the two ways differ in bits"
        )
        row: dict = {}
        for kind, measured in runs.items():
            row[kind] = {
                name: statistics.median(run[name] for run in measured)
                for name in ("step_microseconds", "num_threads")
            }
        pairs = zip(runs["thread"], runs["greenlet"], strict=True)
        row["thread_over_greenlet"] = statistics.median(
            t["step_microseconds"] / g["step_microseconds"] for t, g in pairs
        )
        report["sizes"][f"matrix {size}" if size else "empty step"] = row
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
