"""Starts the processes of a plan with ``accelerate launch`` and stands between them and the user.

    launcher (this process)  ->  agent (accelerate launch, torch's elastic agent)  ->  rank 0, rank 1, ...
       signals, exit status        starts the ranks, notices their end                  the recipe

The agent and the ranks are sessions of their own, so a Ctrl-C reaches the launcher alone and it passes it on.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit.launch import status
from toolkit.launch.agent import FAILURE_NAME
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.rank import FORWARDED_SIGNALS
from toolkit.launch.world import PARENT_VARIABLE, RANK_FOLDER_VARIABLE

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""Time that the ranks have to end after one of them failed: most often they wait for it in a collective."""
SAME_WISH_SECONDS = 1.0
NUM_TAIL_LINES = 20
KILLED = 128 + signal.SIGKILL


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
class Restart:
    """How a run goes on after a rank was killed: other arguments, additional variables, and a sentence that says so."""

    argv: list[str]
    variables: dict[str, str]
    message: str


OnKill = Callable[[KilledRank], Restart | None]
"""Decides whether, and how, a run goes on after a rank was killed."""


def accelerate_arguments(plan: LaunchPlan) -> list[str]:
    """The flags of ``accelerate launch`` for a plan.

    What accelerate would otherwise take from its own configuration file, or announce as a default, is always
    given.
    """
    arguments = []
    if plan.deepspeed is not None:
        arguments += ["--use_deepspeed", "--zero_stage", str(plan.zero_stage)]
    elif plan.num_processes > 1:
        # Also on a CPU, with ACCELERATE_USE_CPU=true: `--cpu --num_processes 2` runs one process, without a
        # word.
        arguments += ["--multi_gpu"]
    return [
        *arguments,
        *("--num_processes", str(plan.num_processes)),
        *("--num_machines", "1"),
        *("--mixed_precision", plan.mixed_precision),
        *("--dynamo_backend", "no"),
        *("--gpu_ids", "all"),
        *("--main_process_port", str(plan.main_process_port)),
    ]


def command(plan: LaunchPlan, argv: Sequence[str]) -> list[str]:
    """The ``accelerate launch`` command of a plan, as a user can type it.

    Args:
        argv: a module and its arguments, e.g. ``["toolkit", "train", "centralized-hf", "--config",
            "run.yaml"]``.
    """
    return ["accelerate", "launch", *accelerate_arguments(plan), "-m", *argv]


def shell_line(plan: LaunchPlan, argv: Sequence[str]) -> str:
    """:func:`command` with the environment that it needs, on one line for a POSIX shell."""
    variables = {name: value for name, value in plan.environment().items() if name != "PATH"}
    return " ".join(
        [
            *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            shlex.join(command(plan, argv)),
        ]
    )


def launch(plan: LaunchPlan, recipe: str, argv: Sequence[str], on_kill: OnKill | None = None) -> int:
    """Run ``meldkit train RECIPE ARGV`` in the processes of a plan.

    Args:
        on_kill: asked each time that a rank was killed, for the arguments after ``RECIPE``; None: the run ends then.

    Returns:
        The exit status of the run: 0, 1, 2 or 75 as the recipe says, 128 + N where signal N killed a process.
    """
    prefix, argv, variables = ["toolkit", "train", recipe], list(argv), dict(os.environ)
    while True:
        exit_status, killed = _run_once(plan, [*prefix, *argv], variables)
        if killed is None:
            return exit_status
        restart = None if on_kill is None else on_kill(killed)
        if restart is None:
            _say(f"{_killed_message(killed)}. --resume continues from the last committed checkpoint")
            return exit_status
        _say(f"{_killed_message(killed)}. {restart.message}")
        argv, variables = restart.argv, variables | restart.variables


@dataclass
class _Signals:
    """Signals that came in: the first is passed on to the ranks, the second kills them.

    Signals that follow the first one at once are the same wish: `timeout`, a closed terminal and cluster
    software send two of them.
    """

    received: list[int] = field(default_factory=list)
    first_seconds: float = 0.0

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.first_seconds = time.monotonic()
        elif time.monotonic() - self.first_seconds < SAME_WISH_SECONDS:
            return
        self.received.append(signal_number)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self.handle) for number in FORWARDED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(plan: LaunchPlan, argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run a module in the processes of a plan and return the exit status of the run. For the main thread
    only.

    Args:
        argv: the module and its arguments.
        environ: the environment of the processes, to which the plan's own variables are added.
    """
    exit_status, killed = _run_once(plan, argv, environ)
    if killed is not None:
        _say(f"{_killed_message(killed)}. --resume continues from the last committed checkpoint")
    return exit_status


def _run_once(
    plan: LaunchPlan, argv: Sequence[str], environ: Mapping[str, str]
) -> tuple[int, KilledRank | None]:
    """The exit status, and the rank that was killed if that ended the run."""
    folder = Path(tempfile.mkdtemp(prefix="meldkit-launch-"))
    log_path = folder / "agent.log"
    agent_command = [
        *(sys.executable, "-m", "toolkit.launch.agent", str(log_path)),
        *accelerate_arguments(plan),
        *("-m", "toolkit.launch.rank", *argv),
    ]
    variables = {
        **environ,
        **plan.environment(),
        RANK_FOLDER_VARIABLE: str(folder),
        PARENT_VARIABLE: str(os.getpid()),
    }
    signals = _Signals()
    try:
        with signals.installed():
            agent = subprocess.Popen(
                agent_command, env=variables, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                was_killed = _supervise(agent, folder, signals)
            finally:
                _kill_all(agent, folder)
        return _outcome(folder, agent.returncode, signals, was_killed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _supervise(agent: subprocess.Popen[bytes], folder: Path, signals: _Signals) -> bool:
    """Wait for the end of the run, passing signals on. Returns whether the user had the processes killed."""
    told: set[int] = set()
    kill_at_seconds: float | None = None
    while True:
        try:
            agent.wait(timeout=POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            pass
        ranks = status.read(folder)
        if len(signals.received) > 1 or (signals.received and not ranks):
            return len(signals.received) > 1
        for rank in ranks:
            if signals.received and rank.exit_status is None and rank.pid not in told:
                told.add(rank.pid)
                _send(rank.pid, signals.received[0])
        if kill_at_seconds is None and any(_has_failed(rank) for rank in ranks):
            kill_at_seconds = time.monotonic() + GRACE_SECONDS
        if kill_at_seconds is not None and time.monotonic() > kill_at_seconds:
            for rank in ranks:
                if rank.exit_status is None:
                    _send_group(rank.pid, signal.SIGKILL)


def _has_failed(rank: status.RankStatus) -> bool:
    """Whether a rank ended badly, or is gone without a word."""
    if rank.exit_status is None:
        return not _is_running(rank.pid)
    return rank.exit_status not in (status.SUCCESS, status.INTERRUPTED)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _send(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _send_group(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal_number)


def _kill_all(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill what is left of the run: each rank with its children (a session of its own), then the agent."""
    if agent.poll() is not None:
        return
    for rank in status.read(folder):
        if rank.exit_status is None:
            _send_group(rank.pid, signal.SIGKILL)
    _send_group(agent.pid, signal.SIGKILL)
    agent.wait()


def _outcome(
    folder: Path, agent_status: int, signals: _Signals, was_killed: bool
) -> tuple[int, KilledRank | None]:
    """Work out the exit status of the run, and who was killed; say on stderr what the ranks could not say
    themselves."""
    ranks = status.read(folder)
    if was_killed:
        _say("killed at the second signal; --resume continues from the last committed checkpoint")
        return KILLED, None
    exit_statuses = {rank.rank: rank.exit_status for rank in ranks if rank.exit_status is not None}
    result = status.most_telling(exit_statuses.values()) if exit_statuses else status.SUCCESS
    failure = _first_failure(folder)
    if result != status.INPUT_WRONG and failure is not None and failure["exit_code"] < 0:
        number = -failure["exit_code"]
        if not signals.received and exit_statuses.get(failure["rank"]) is None:
            name, task = signal.Signals(number).name, status.read_task(folder, failure["rank"])
            return 128 + number, KilledRank(failure["rank"], failure["pid"], name, task)
    if signals.received and result == status.SUCCESS and (agent_status != 0 or not exit_statuses):
        return status.INTERRUPTED, None
    if result == status.SUCCESS and agent_status != 0:
        _say(f"the processes could not be started or did not end well\n{_tail(folder / 'agent.log')}")
        return status.FAILED, None
    failed = [number for number, exit_status in exit_statuses.items() if exit_status == result]
    if result not in (status.SUCCESS, status.INTERRUPTED) and failed and 0 not in failed:
        _say(
            f"rank {failed[0]} failed with exit status {result}; the end of its output:\n"
            + _tail(status.output_path(folder, failed[0]))
        )
    return result, None


def _first_failure(folder: Path) -> dict[str, Any] | None:
    path = folder / FAILURE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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


def _say(message: str) -> None:
    sys.stderr.write(f"meldkit: {message}\n")
    sys.stderr.flush()
