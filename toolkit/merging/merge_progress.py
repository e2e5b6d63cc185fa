"""How far a merge is: a bar on a terminal, a line now and then elsewhere."""

import bisect
import itertools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from toolkit.merging.plan import MergePlan
from toolkit.reporting.wording import duration, size

LINE_INTERVAL_SECONDS = 10.0
REFRESH_SECONDS = 0.1


class MergeProgress:
    """Shows bytes, tensors, GB/s and the time that is left.

    Args:
        plan: of the merge.
        quiet: show nothing.
        stream: where to.
        clock: seconds, rising.
    """

    def __init__(
        self,
        plan: MergePlan,
        *,
        quiet: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._clock = clock
        self._total = max(plan.bytes_written, 1)
        self._traffic = (plan.bytes_read + plan.bytes_written) / self._total
        self._ends = list(itertools.accumulate(tensor.num_bytes for tensor in plan.tensors))
        self._began: float | None = None
        self._begun_at = 0
        self._shown_at = clock()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "MergeProgress":
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            console = Console(file=self._stream)
            self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("merging", total=self._total, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, bytes_done: int) -> None:
        """``bytes_done`` of the result are written. Called from any thread."""
        if self._quiet:
            return
        now = self._clock()
        if self._began is None:
            self._began, self._begun_at = now, bytes_done
        interval = LINE_INTERVAL_SECONDS if self._bar is None else REFRESH_SECONDS
        if now - self._shown_at < interval and bytes_done < self._total:
            return
        self._shown_at = now
        text = self.text(bytes_done, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=bytes_done, text=text, refresh=True)
        elif bytes_done < self._total:
            self._stream.write(f"merging: {text}\n")
            self._stream.flush()

    def text(self, bytes_done: int, now: float) -> str:
        """``42% 1.20/2.86 GB, 120/291 tensors, 5.1 GB/s, 0:02 left``."""
        fresh = bytes_done - self._begun_at
        seconds = now - (self._began if self._began is not None else now)
        parts = [
            f"{100 * bytes_done // self._total}%",
            f"{size(bytes_done)} of {size(self._total)}",
            f"{bisect.bisect_right(self._ends, bytes_done)}/{len(self._ends)} tensors",
        ]
        if fresh > 0 and seconds > 0:
            parts.append(f"{fresh * self._traffic / seconds / 1e9:.1f} GB/s")
            parts.append(f"{duration((self._total - bytes_done) * seconds / fresh)} left")
        return ", ".join(parts)
