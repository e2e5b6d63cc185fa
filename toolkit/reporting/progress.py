"""How far each participant is, and the bars that show it on a terminal."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from toolkit.reporting import wording
from toolkit.reporting.records import StepRecord
from toolkit.reporting.round_metrics import main_metric

REFRESH_SECONDS = 0.125
RECENT_STEPS = 50
# Lines of the terminal that the bars leave free.
SPARE_LINES = 4
MIN_BAR_WIDTH = 10
MAX_BAR_WIDTH = 40
MAX_NAME_LENGTH = 20
# What is left out on a narrow terminal, first to last.
DISPENSABLE = ("rate", "memory", "percent", "steps", "speed", "metric", "left")

SHORT_NAMES = {"accuracy": "acc"}
LEFT_STYLES = {"": "", "failed": "bold red", "stopped early": "yellow"}

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
        self.metric = ""
        """The newest value of its main metric on held-out rows, as text."""
        self.status = ""
        """Why it trains no more; empty while it does."""
        self.first_step = 0
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, record: StepRecord) -> None:
        self._recent_seconds.append(record.step_seconds)
        if self.last is None:
            self.first_step = record.step
        self.last = record
        self.update_number = next(_update_numbers)
        if self.num_epochs is None and record.epoch > 0:
            self.num_epochs = record.epoch * record.num_steps / record.step

    def show_metrics(self, metrics: Mapping[str, float]) -> None:
        name = main_metric(list(metrics))
        if name is not None:
            value = metrics.get(name, metrics.get(f"eval_{name}"))
            self.metric = f"{SHORT_NAMES.get(name, name)} {wording.number(value)}"

    def seconds_left(self) -> float | None:
        """Time of the steps to come, at the median pace of the recent ones; None before the first step."""
        if self.last is None or not self._recent_seconds:
            return None
        return statistics.median(self._recent_seconds) * (self.last.num_steps - self.last.step)


def seconds_left_of_all(progress: Collection[Progress], elapsed_seconds: float) -> float | None:
    """Time of the steps to come at the pace of all since the first one, evaluations and merges included."""
    begun = [p for p in progress if p.last is not None]
    num_done = sum(p.last.step - p.first_step + 1 for p in begun if p.last)
    num_left = sum(p.last.num_steps - p.last.step for p in begun if p.last and not p.status)
    # Of those that have not begun the steps are not known yet; they are taken to be as many.
    num_waiting = sum(p.last is None and not p.status for p in progress)
    if begun and num_waiting:
        num_left += num_waiting * max(p.last.num_steps for p in begun if p.last)
    return elapsed_seconds * num_left / num_done if num_done else None


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
        footer: Callable[[], str] = lambda: "",
    ) -> None:
        self._console = console
        self._footer = footer
        self._progress = progress
        self._clock = clock
        self._drawn_at: float | None = None
        self._live: Live | None = None

    def refresh(self, *, force: bool = False) -> None:
        if all(progress.last is None for progress in self._progress.values()):
            return
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
        footer = self._footer()
        table = self._participants(max(1, self._console.height - SPARE_LINES - bool(footer)))
        return Group(table, Text(f"  {footer}", style="dim", no_wrap=True)) if footer else table

    def _participants(self, room: int) -> RenderableType:
        active = [progress for progress in self._progress.values() if progress.last is not None]
        if len(active) <= room:
            return self._table(active)
        newest = sorted(active, key=lambda progress: progress.update_number)[-max(1, room - 1) :]
        shown = [progress for progress in active if progress in newest]
        return Group(self._table(shown), Text(f"  and {len(active) - len(shown)} more", style="dim"))

    def _table(self, shown: list[Progress]) -> Table:
        many = len(self._progress) > 1
        newest = max((progress.update_number for progress in shown), default=0)
        rows = [_cells(p, many=many, is_training=p.update_number == newest) for p in shown]
        names = list(rows[0])
        widths = {name: max(cell_len(row[name]) for row in rows) for name in names}

        def room() -> int:
            return self._console.width - sum(widths[name] + 1 for name in names)

        for name in DISPENSABLE:
            if name in names and room() < MIN_BAR_WIDTH:
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
            styles = {"label": "bold", "left": LEFT_STYLES.get(progress.status, "dim")}
            texts = [Text(row[name], style=styles.get(name, "")) for name in names]
            table.add_row(texts[0], bar, *texts[1:])
        return table


def _cells(progress: Progress, *, many: bool, is_training: bool) -> dict[str, str]:
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
    # One after the other: only one of them trains at a time.
    is_over = bool(progress.status) or record.step == record.num_steps
    mark = "▶ " if many and is_training and not is_over else "  "
    return {
        "label": f"{mark}{label}",
        "percent": f"{100 * record.step // record.num_steps}%",
        "steps": f"{record.step}/{record.num_steps}",
        "loss": f"loss {wording.number(record.loss)}",
        **({"metric": progress.metric} if many else {}),
        "rate": f"lr {wording.rate(record.learning_rate)}",
        "speed": wording.speed(record.tokens_per_second),
        "memory": wording.size(record.memory_bytes),
        "left": progress.status or f"{wording.duration(progress.seconds_left())} left",
    }
