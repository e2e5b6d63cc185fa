"""How far each participant is, and the bars that show it on a terminal."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from toolkit.reporting import wording
from toolkit.reporting.records import StepRecord

REFRESH_SECONDS = 0.125
RECENT_STEPS = 50
# Lines of the terminal that the bars leave free.
SPARE_LINES = 4


class Progress:
    """What is known of one participant's progress.

    Args:
        name: the participant.
        num_epochs: passes over the data in the whole run; None: worked out from the first step.
    """

    def __init__(self, name: str, num_epochs: float | None) -> None:
        self.name = name
        self.num_epochs = num_epochs
        self.last: StepRecord | None = None
        self.line_at: float | None = None
        self.line_step = 0
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, record: StepRecord) -> None:
        if self.last is not None or record.step_seconds > 0:
            self._recent_seconds.append(record.step_seconds)
        self.last = record
        if self.num_epochs is None and record.epoch > 0:
            self.num_epochs = record.epoch * record.num_steps / record.step

    def seconds_left(self) -> float | None:
        """Time of the steps to come, at the median pace of the recent ones; None before the first step."""
        if self.last is None or not self._recent_seconds:
            return None
        return statistics.median(self._recent_seconds) * (self.last.num_steps - self.last.step)


class ProgressBars:
    """One line a participant at the bottom of the terminal, drawn again as steps come in (no thread).

    Participants that do not fit on the screen are left out, those that made a step longest ago first.
    """

    def __init__(
        self,
        console: Console,
        progress: Mapping[str, Progress],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._progress = progress
        self._clock = clock
        self._drawn_at: float | None = None
        self._live: Live | None = None
        self._recent: dict[str, None] = {}

    def refresh(self, *, force: bool = False) -> None:
        now = self._clock()
        if not force and self._drawn_at is not None and now - self._drawn_at < REFRESH_SECONDS:
            return
        self._drawn_at = now
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
            # Live hides the cursor. A process that is killed could not show it again, so it stays.
            self._console.show_cursor(True)
        self._live.update(self.render(), refresh=True)

    def stop(self) -> None:
        """Leave the bars on the screen as they are, and the terminal as it was."""
        if self._live is not None:
            self._live.update(self.render())
            self._live.stop()
            self._live = None

    def render(self) -> RenderableType:
        active = [progress for progress in self._progress.values() if progress.last is not None]
        room = max(1, self._console.height - SPARE_LINES)
        if len(active) <= room:
            return self._table(active)
        newest = sorted(active, key=lambda progress: progress.last.step if progress.last else 0)[: room - 1]
        shown = [progress for progress in active if progress in newest]
        return Group(self._table(shown), Text(f"  and {len(active) - len(shown)} more", style="dim"))

    def _table(self, shown: list[Progress]) -> Table:
        width = self._console.width
        table = Table.grid(padding=(0, 1), expand=False)
        many = len(self._progress) > 1
        for _ in range(2):
            table.add_column(no_wrap=True)
        for _ in range(7):
            table.add_column(no_wrap=True, justify="right")
        for progress in shown:
            table.add_row(*self._cells(progress, width=width, many=many))
        return table

    def _cells(self, progress: Progress, *, width: int, many: bool) -> list[RenderableType]:
        record = progress.last
        assert record is not None
        label = wording.epoch_label(record.epoch, progress.num_epochs, phase_end=True).capitalize()
        if many:
            label = f"{progress.name} {label.removeprefix('Epoch ')}"
        cells: list[RenderableType] = [
            Text(f"  {label}", style="bold"),
            ProgressBar(total=record.num_steps, completed=record.step, width=max(6, min(40, width - 66))),
            f"{100 * record.step // record.num_steps}%",
            f"{record.step}/{record.num_steps}",
            f"loss {wording.number(record.loss)}",
            wording.speed(record.tokens_per_second),
        ]
        if width >= 76:
            cells.append(wording.size(record.memory_bytes))
        if width >= 100:
            cells.append(f"lr {wording.rate(record.learning_rate)}")
        cells.append(wording.duration(progress.seconds_left()))
        return cells
