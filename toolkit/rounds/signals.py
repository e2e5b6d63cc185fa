"""Ctrl-C, SIGTERM and SIGHUP as a request: finish the step, commit a checkpoint, then leave."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from toolkit.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAME_REQUEST_SECONDS = 1.0
"""Signals closer together are one request: a cluster may signal the launcher and its processes both."""


class StopRequest:
    """While entered, the first signal is remembered and the second ends the run at once.

    Args:
        on_first: called with the signal's name when the first one arrives.
    """

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self._on_first = on_first
        self._previous: dict[signal.Signals, Any] = {}
        self.received: str | None = None
        self._received_at = 0.0
        self._process = os.getpid()

    def __call__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, forked with this handler
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self.received is None:
            self.received, self._received_at = name, now
            self._on_first(name)
        elif now - self._received_at >= SAME_REQUEST_SECONDS:
            raise Interrupted(f"{name} again: left at once; the run can be resumed from its last checkpoint")
