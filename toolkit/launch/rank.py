"""One process of a run, started by our launcher: ``python -m toolkit.launch.rank MODULE ARGUMENTS...``.

It runs MODULE as ``python -m MODULE`` would, and around it: reports its exit status to the launcher, keeps
the output of every rank but the first out of the terminal, and dies with the launcher, so that no process of
a killed run goes on writing into its folder.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from toolkit.launch import status
from toolkit.launch.world import PARENT_VARIABLE, RANK_FOLDER_VARIABLE, TASK_FILE_VARIABLE

FORWARDED_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that the launcher passes on to the ranks. The process between the two blocks them."""

INPUT_WRONG_WAIT_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    expected_parent = os.environ.get(PARENT_VARIABLE, str(os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Another parent: the one that started this process ended before the kernel was told. A parent that is
    # process 1 is nothing special: in a container that is meldkit itself.
    if str(os.getppid()) != expected_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _stop_before_start(signal_number: int, frame: FrameType | None) -> None:
    """Stand in for the recipe's own handler until it has one: nothing has begun, so there is nothing to
    save."""
    raise SystemExit(status.INTERRUPTED)


def _redirect_output(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _let_rank_0_say_it(folder: Path) -> None:
    """Wait until rank 0 has ended too: every rank finds the same input wrong, and rank 0 has the terminal.

    Without this the end of this rank would stop rank 0 before its message.
    """
    give_up_at_seconds = time.monotonic() + INPUT_WRONG_WAIT_SECONDS
    while time.monotonic() < give_up_at_seconds:
        if any(rank.rank == 0 and rank.exit_status is not None for rank in status.read(folder)):
            return
        time.sleep(0.05)


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module as ``python -m`` does and return the exit status it ends with. Tracebacks go to stderr."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as request:
        if request.code is None:
            return status.SUCCESS
        if isinstance(request.code, int):
            return request.code & 0xFF
        sys.stderr.write(f"{request.code}\n")
        return status.FAILED
    except KeyboardInterrupt:
        return status.INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return status.FAILED
    return status.SUCCESS


def main() -> int:
    die_with_parent()
    folder, rank = Path(os.environ[RANK_FOLDER_VARIABLE]), int(os.environ["RANK"])
    if rank != 0:
        _redirect_output(status.output_path(folder, rank))
    os.environ[TASK_FILE_VARIABLE] = str(status.task_path(folder, rank))
    for signal_number in FORWARDED_SIGNALS:
        signal.signal(signal_number, _stop_before_start)
    status.report(folder, rank, None)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)
        exit_status = run_module(sys.argv[1], sys.argv[2:])
    except SystemExit:
        exit_status = status.INTERRUPTED
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if exit_status == status.INPUT_WRONG and rank != 0:
        _let_rank_0_say_it(folder)
    status.report(folder, rank, exit_status)
    # To torch's agent an interrupted rank looks done: on any other status it would at once stop the ranks
    # that are still writing their checkpoint. The launcher reads the true status from the report.
    return status.SUCCESS if exit_status == status.INTERRUPTED else exit_status


if __name__ == "__main__":
    sys.exit(main())
