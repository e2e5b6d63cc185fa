"""How a process of a run tells the launcher its exit status.

``accelerate launch`` turns every status of its children into 1. So each process writes ``rank-N.json`` into
a folder that it finds in an environment variable: with its process id when it starts, with its exit status
when it ends. A process that was killed has no status there; what it was at stands in ``task-N.txt``, if it said so.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.durable import write_json
from toolkit.launch.world import TASK_FILE_VARIABLE

SUCCESS, FAILED, INPUT_WRONG, INTERRUPTED = 0, 1, 2, 75

_MOST_TELLING_FIRST = (INPUT_WRONG, FAILED, INTERRUPTED, SUCCESS)
"""Wrong input is a cause, never a consequence. A process fails, or is interrupted, also because another one
failed."""


@dataclass(frozen=True)
class RankStatus:
    """One process: its rank, its process id, and its exit status once it has ended by itself."""

    rank: int
    pid: int
    exit_status: int | None


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def output_path(folder: Path, rank: int) -> Path:
    """File that takes the output of a process other than rank 0."""
    return folder / f"rank-{rank}.log"


def task_path(folder: Path, rank: int) -> Path:
    """File in which a process says what it is at."""
    return folder / f"task-{rank}.txt"


def say_task(task: str) -> None:
    """Tell the launcher, if it is ours, what this process is at from now on, in case that it is killed over it.

    Args:
        task: for example a participant's name; empty where nobody in particular is to blame.
    """
    if path := os.environ.get(TASK_FILE_VARIABLE):
        Path(path).write_text(task, encoding="utf-8")  # it matters for as long as the machine runs: no sync


def read_task(folder: Path, rank: int) -> str:
    """What a process said last; empty if nothing."""
    path = task_path(folder, rank)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def report(folder: Path, rank: int, exit_status: int | None) -> None:
    """Write what is known of this process: its id and, at its end, its exit status."""
    write_json(_path(folder, rank), asdict(RankStatus(rank, os.getpid(), exit_status)))


def read(folder: Path) -> list[RankStatus]:
    """All processes that have reported, by rank."""
    statuses = [
        RankStatus(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")
    ]
    return sorted(statuses, key=lambda status: status.rank)


def most_telling(exit_statuses: Iterable[int]) -> int:
    """The exit status of the run, of those of its processes; 0 only where all are 0."""
    found = set(exit_statuses)
    for exit_status in _MOST_TELLING_FIRST:
        if exit_status in found:
            others = found - set(_MOST_TELLING_FIRST)
            # A status that is not one of ours (a script's own) says more than interrupted or done.
            return max(others) if others and exit_status in (INTERRUPTED, SUCCESS) else exit_status
    return max(found, default=FAILED)
