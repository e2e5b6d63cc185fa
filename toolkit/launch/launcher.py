"""Starts the processes of a plan with ``accelerate launch`` and stands between them and the user.

    launcher (this process)  ->  agent (accelerate launch, torch's elastic agent)  ->  rank 0, rank 1, ...
       signals, exit status        starts the ranks, notices their end                  the recipe

The agent and the ranks are sessions of their own, so a Ctrl-C reaches the launcher alone and it passes it on.
"""

import contextlib
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

from toolkit.launch import status
from toolkit.launch.ending import Ending, KilledRank, ending_of
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.rank import FORWARDED_SIGNALS
from toolkit.launch.world import PARENT_VARIABLE, RANK_FOLDER_VARIABLE

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""Time that the ranks have to end after one of them failed: most often they wait for it in a collective."""
SAME_WISH_SECONDS = 1.0


@dataclass(frozen=True)
class Restart:
    """How a run goes on after a rank was killed.

    Attributes:
        arguments: besides those that it was started with.
        variables: of the environment, besides those.
        message: a sentence that says so.
    """

    arguments: list[str]
    variables: dict[str, str]
    message: str


OnKill = Callable[[KilledRank], Restart | None]
"""Decides whether, and how, a run goes on after a rank was killed; None: it ends."""


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
        on_kill: asked each time that a rank was killed; None: the run ends then.

    Returns:
        The exit status of the run: 0, 1, 2 or 75 as the recipe says, 128 + N where signal N killed a process.
    """
    return run(plan, ["toolkit", "train", recipe, *argv], on_kill=on_kill)


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


def run(
    plan: LaunchPlan,
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    on_kill: OnKill | None = None,
) -> int:
    """Run a module in the processes of a plan and return the exit status of the run. For the main thread
    only.

    Args:
        argv: the module and its arguments.
        environ: the environment of the processes, to which the plan's own variables are added.
        on_kill: see :func:`launch`.
    """
    more, variables = list[str](), dict(environ)
    while True:
        ending = _run_once(plan, [*argv, *more], variables)
        killed = ending.killed
        restart = None if killed is None or on_kill is None else on_kill(killed)
        if ending.message:
            _say(ending.message + (restart.message if restart is not None else ending.advice))
        if restart is None:
            return ending.exit_status
        more, variables = restart.arguments, variables | restart.variables


def _run_once(plan: LaunchPlan, argv: Sequence[str], environ: Mapping[str, str]) -> Ending:
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
        return ending_of(
            folder, agent.returncode, was_asked_to_stop=bool(signals.received), was_killed=was_killed
        )
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


def _say(message: str) -> None:
    sys.stderr.write(f"meldkit: {message}\n")
    sys.stderr.flush()
