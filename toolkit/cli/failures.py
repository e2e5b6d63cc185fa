"""What the user sees of an error, and the exit status that follows from it.

0 done; 1 the run failed; 2 the input is wrong and nothing was started; 75 interrupted, can be resumed.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from toolkit.errors import ConfigError, Interrupted, MeldkitError
from toolkit.terminal import RED, err, styled

FAILED, INPUT_WRONG, INTERRUPTED = 1, 2, 75


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Like KeyboardInterrupt no ``Exception``, so that no library swallows it on the way."""


def stop_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def guarded(
    action: Callable[[], int],
    *,
    debug: bool,
    log: Callable[[], Path | None] = lambda: None,
    resume_hint: Callable[[], str | None] = lambda: None,
) -> int:
    """Run ``action`` and return the exit status; an error becomes one message.

    Args:
        action: returns an exit status.
        debug: show tracebacks on standard error.
        log: returns the log file that gets the traceback of an unexpected error, if the run has one by then.
        resume_hint: returns the command that goes on with an interrupted run.
    """
    try:
        return action()
    except BrokenPipeError:
        # The reader has gone (`| head`). Nothing more can be said to it, also not when Python flushes at the
        # end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Interrupted as error:
        _say(
            "interrupted",
            error.message.removeprefix("interrupted "),
            error.hint or resume_hint(),
            debug=debug,
        )
        return error.exit_status
    except KeyboardInterrupt as error:
        signal_name = "SIGTERM" if isinstance(error, Terminated) else "SIGINT"
        _say("interrupted", signal_name, resume_hint(), debug=debug)
        return INTERRUPTED
    except MeldkitError as error:
        if not (isinstance(error, ConfigError) and _rank() not in ("", "0")):  # every rank finds the same
            _say("error", error.message, error.hint, debug=debug)
        return error.exit_status
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        hint = None if debug else f"the traceback is in {_write_traceback(log())}; --debug shows it here"
        _say("error", what if len(what) <= 400 else what[:396] + " ...", hint, debug=debug)
        return FAILED


def _say(kind: str, message: str, hint: str | None, *, debug: bool) -> None:
    if debug:
        import traceback

        err(traceback.format_exc().rstrip())
    rank = _rank()
    head = kind if rank in ("", "0") else f"[rank {rank}] {kind}"
    err(f"{styled(head + ':', RED, sys.stderr)} {message}")
    if hint:
        err(f"  hint: {hint}")


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", ""))


def _write_traceback(log: Path | None) -> Path:
    """Append the traceback to the log of the run, or write it to a file of its own."""
    # Imported here: help and dry runs answer faster without.
    import tempfile
    import traceback
    from datetime import UTC, datetime

    text = f"{datetime.now(UTC).isoformat(timespec='seconds')} ERROR\n{traceback.format_exc()}"
    if log is not None:
        try:
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(text)
            return log
        except OSError:  # a full disk may be the very reason for the error
            pass
    with tempfile.NamedTemporaryFile(
        "w", prefix="meldkit-", suffix=".log", delete=False, encoding="utf-8"
    ) as stream:
        stream.write(text)
    return Path(stream.name)
