"""How often something that costs time is done again."""

import contextlib
import time
from collections.abc import Iterator


class Pace:
    """Says when it is time to do something again.

    Args:
        interval_seconds: not more often than this.
        max_share: and not so often that it takes a larger share of the time than this.
    """

    def __init__(self, *, interval_seconds: float, max_share: float) -> None:
        self._interval_seconds = interval_seconds
        self._max_share = max_share
        self._last_end: float | None = None
        self._cost_seconds = 0.0

    def is_due(self, *, urgent: bool = False) -> bool:
        """True the first time, and when enough time has passed; ``urgent`` looks at the share only."""
        if self._last_end is None:
            return True
        pause = self._cost_seconds / self._max_share
        return time.monotonic() - self._last_end >= (pause if urgent else max(pause, self._interval_seconds))

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around the work itself: notes when it ended and how long it took."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._last_end = time.monotonic()
            self._cost_seconds = self._last_end - begin
