"""How a run with several processes has ended, and what to say of it that they could not say themselves."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from toolkit.launch import status
from toolkit.launch.agent import FAILURE_NAME

NUM_TAIL_LINES = 20
KILLED = 128 + signal.SIGKILL
GO_ON = "--resume continues from the last committed checkpoint"


@dataclass(frozen=True)
class KilledRank:
    """A process of the run that a signal ended, and nobody had asked for it.

    Attributes:
        rank, pid: of the process.
        signal_name: ``SIGKILL``, ``SIGSEGV``, ...
        task: what it had said that it was at; may be empty.
    """

    rank: int
    pid: int
    signal_name: str
    task: str


@dataclass(frozen=True)
class Ending:
    """How a run has ended.

    Attributes:
        exit_status: 0, 1, 2 or 75 as the recipe says, 128 + N where signal N killed a process.
        message: for the user; empty where the processes have said all there is.
        advice: what the user can do about it, after the message.
        killed: the process whose end was that of the run, if the system killed it.
    """

    exit_status: int
    message: str = ""
    advice: str = ""
    killed: KilledRank | None = None


def ending_of(folder: Path, agent_status: int, *, was_asked_to_stop: bool, was_killed: bool) -> Ending:
    """Work out the ending from what the processes have reported.

    Args:
        folder: of their reports.
        agent_status: exit status of the agent.
        was_asked_to_stop: a signal was passed on to them.
        was_killed: they were killed at the second signal.
    """
    if was_killed:
        return Ending(KILLED, "killed at the second signal; ", GO_ON)
    exit_statuses = {r.rank: r.exit_status for r in status.read(folder) if r.exit_status is not None}
    result = status.most_telling(exit_statuses.values()) if exit_statuses else status.SUCCESS
    killed = _killed(folder)
    is_told = was_asked_to_stop or result == status.INPUT_WRONG
    if killed is not None and not is_told and killed.rank not in exit_statuses:
        number = signal.Signals[killed.signal_name].value
        return Ending(128 + number, f"{_killed_message(killed)}. ", GO_ON, killed)
    if was_asked_to_stop and result == status.SUCCESS and (agent_status != 0 or not exit_statuses):
        return Ending(status.INTERRUPTED)
    if result == status.SUCCESS and agent_status != 0:
        return Ending(
            status.FAILED,
            f"the processes could not be started or did not end well\n{_tail(folder / 'agent.log')}",
        )
    failed = [number for number, exit_status in exit_statuses.items() if exit_status == result]
    if result in (status.SUCCESS, status.INTERRUPTED) or not failed or 0 in failed:
        return Ending(result)
    output = _tail(status.output_path(folder, failed[0]))
    return Ending(
        result, f"rank {failed[0]} failed with exit status {result}; the end of its output:\n{output}"
    )


def _killed(folder: Path) -> KilledRank | None:
    path = folder / FAILURE_NAME
    failure = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"exit_code": 0}
    if failure["exit_code"] >= 0:
        return None
    rank, name = failure["rank"], signal.Signals(-failure["exit_code"]).name
    return KilledRank(rank, failure["pid"], name, status.read_task(folder, rank))


def _killed_message(killed: KilledRank) -> str:
    message = f"rank {killed.rank} (process {killed.pid}) was killed by {killed.signal_name}"
    if killed.task:
        message += f" while it worked on {killed.task}"
    if killed.signal_name == "SIGKILL":
        message += "; the system does that when memory runs out (dmesg tells): try a smaller --batch-size"
    return message


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join(f"  | {line}" for line in lines[-NUM_TAIL_LINES:]) or "  | (no output)"
