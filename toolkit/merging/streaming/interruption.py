"""Ctrl-C and SIGTERM while a merge runs: finish the piece, record what is done, leave."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from toolkit.errors import Interrupted

# Who has handlers of their own (a training loop that merges) keeps them.
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def stop_request() -> Iterator[Callable[[], None]]:
    """Gives a function that raises Interrupted once a signal has come; a second signal ends the process at once."""
    received: list[str] = []
    previous: dict[signal.Signals, object] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - it came from getsignal

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    def check() -> None:
        if received:
            raise Interrupted(
                f"{received[0]}: the merge was left unfinished", hint="--resume goes on with it"
            )

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) in _DEFAULTS:
                previous[number] = handler
                signal.signal(number, remember)
    try:
        yield check
    finally:
        restore()
