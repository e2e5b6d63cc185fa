"""``accelerate launch`` in a process of its own: ``python -m toolkit.launch.agent LOG ARGUMENTS...``.

What accelerate and torch's agent say (notices, tables of failures, tracebacks) goes to the file LOG: they
write to Python's stdout and stderr. The ranks inherit the file descriptors, so rank 0 writes to the terminal
itself.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from toolkit.durable import write_json
from toolkit.launch.rank import FORWARDED_SIGNALS, die_with_parent
from toolkit.launch.world import PARENT_VARIABLE

FAILURE_NAME = "first-failure.json"


def _record_failure(folder: Path, error: Any) -> None:
    """Keep which rank ended badly first, and how: a negative exit code is the signal that killed it.

    Where several ended between two looks at them, one that was killed is the cause: the others miss it in a collective.
    """
    killed = [failure for failure in error.failures.values() if failure.exitcode < 0]
    failure = killed[0] if killed else error.get_first_failure()[1]
    write_json(
        folder / FAILURE_NAME, {"rank": failure.local_rank, "pid": failure.pid, "exit_code": failure.exitcode}
    )


def main() -> int:
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the ranks, which are children of this process
    log_path = Path(sys.argv[1])
    sys.argv = ["accelerate launch", *sys.argv[2:]]
    # The launcher signals the ranks. Torch's agent would give them 30 seconds and then kill them, in the
    # middle of a checkpoint; a blocked signal never reaches it. The ranks inherit the block and lift it.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    with (
        log_path.open("w", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        # Imported here: loggers keep the stderr that they find when they are made.
        from accelerate.commands.launch import main as accelerate_launch
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            accelerate_launch()
        except ChildFailedError as error:
            _record_failure(log_path.parent, error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
