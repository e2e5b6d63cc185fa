"""How far each participant is, and the bars that show it on a terminal."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.cells import cell_len
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
MIN_BAR_WIDTH = 10
MAX_BAR_WIDTH = 40
MAX_NAME_LENGTH = 20
# What is left out on a narrow terminal, first to last.
DISPENSABLE = ("rate", "memory", "percent", "speed", "steps", "left")

_update_numbers = itertools.count(1)


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
        self.update_number = 0
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, record: StepRecord) -> None:
        self._recent_seconds.append(record.step_seconds)
        self.last = record
        self.update_number = next(_update_numbers)
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
        newest = sorted(active, key=lambda progress: progress.update_number)[-max(1, room - 1) :]
        shown = [progress for progress in active if progress in newest]
        return Group(self._table(shown), Text(f"  and {len(active) - len(shown)} more", style="dim"))

    def _table(self, shown: list[Progress]) -> Table:
        many = len(self._progress) > 1
        rows = [_cells(progress, many=many) for progress in shown]
        names = list(rows[0])
        widths = {name: max(cell_len(row[name]) for row in rows) for name in names}

        def room() -> int:
            return self._console.width - sum(widths[name] + 1 for name in names)

        for name in DISPENSABLE:
            if room() < MIN_BAR_WIDTH:
                names.remove(name)
        table = Table.grid(padding=(0, 1, 0, 0))
        bar_width = min(MAX_BAR_WIDTH, max(MIN_BAR_WIDTH, room()))
        for name in names:
            table.add_column(no_wrap=True, justify="left" if name == "label" else "right")
            if name == "label":
                table.add_column(no_wrap=True)
        for progress, row in zip(shown, rows, strict=True):
            last = progress.last
            bar = ProgressBar(
                total=last.num_steps if last else 1, completed=last.step if last else 0, width=bar_width
            )
            texts = [Text(row[name], style="bold" if name == "label" else "") for name in names]
            table.add_row(texts[0], bar, *texts[1:])
        return table


def _cells(progress: Progress, *, many: bool) -> dict[str, str]:
    record = progress.last
    if record is None:
        raise ValueError(f"{progress.name} has made no step yet")
    label = wording.epoch_label(record.epoch, progress.num_epochs, phase_end=True).capitalize()
    if many:
        name = (
            progress.name
            if len(progress.name) <= MAX_NAME_LENGTH
            else f"{progress.name[: MAX_NAME_LENGTH - 1]}…"
        )
        label = f"{name} {label.removeprefix('Epoch ')}"
    return {
        "label": f"  {label}",
        "percent": f"{100 * record.step // record.num_steps}%",
        "steps": f"{record.step}/{record.num_steps}",
        "loss": f"loss {wording.number(record.loss)}",
        "rate": f"lr {wording.rate(record.learning_rate)}",
        "speed": wording.speed(record.tokens_per_second),
        "memory": wording.size(record.memory_bytes),
        "left": f"{wording.duration(progress.seconds_left())} left",
    }
