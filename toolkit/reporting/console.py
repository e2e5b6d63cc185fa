"""The terminal: configuration, progress, evaluations, messages, summary.

On a terminal there is one bar a participant; in a pipe or a log of a build server there are plain lines, few
of them.
"""

import atexit
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

import rich.console
from rich.text import Text

from toolkit.reporting import round_wording, wording
from toolkit.reporting.log_file import RUN_RECORD
from toolkit.reporting.progress import Progress, ProgressBars
from toolkit.reporting.records import (
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    Level,
    MessageRecord,
    Record,
    RunEnd,
    RunStart,
    SampleRecord,
    StepRecord,
)
from toolkit.reporting.round_view import RoundView, comparison_table

LINE_INTERVAL_SECONDS = 10.0
MESSAGE_STYLES: dict[Level, str] = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
STATUS_STYLES = {"done": "bold green", "interrupted": "bold yellow", "failed": "bold red"}


class Console:
    """Listener that shows a run to a person.

    Args:
        stream: where to write; None: standard output.
        log_level: lowest level of the messages that are shown, and of what the libraries' loggers say.
        train_loss: gives the training loss that belongs to an evaluation.
        clock: seconds, rising; another one in tests.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        log_level: str = "INFO",
        train_loss: Callable[[EvaluationRecord], float | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._level = logging.getLevelName(log_level)
        self._train_loss = train_loss
        self._clock = clock
        self._is_live = is_interactive(self._stream)
        self._rich = rich.console.Console(
            file=self._stream, highlight=False, soft_wrap=False, force_terminal=self._is_live or None
        )
        self._progress: dict[str, Progress] = {}
        self._rounds = RoundView(self._progress, clock)
        self._bars: ProgressBars | None = None
        self._many = False
        self._num_epochs: float | None = None
        self._began = clock()
        self._handler = _LibraryMessages(self)
        self._loggers = [logging.getLogger(name) for name in ("toolkit", "py.warnings")]
        for logger in self._loggers:
            logger.addHandler(self._handler)
        # However the process ends, the cursor and the terminal are as they were.
        atexit.register(self._stop_bars)

    def handle(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._handle_step(record)
        elif isinstance(record, EvaluationRecord):
            label = wording.evaluation_label(record, self._num_epochs)
            metrics = wording.evaluation_metrics(record.metrics, self._train_loss(record))
            if record.participant in self._progress:
                self._progress[record.participant].show_metrics(record.metrics)
            self._entry(self._named(record.participant, label), metrics)
            self._refresh()
        elif isinstance(record, SampleRecord):
            self._entry(self._named(record.participant, f"answer {record.phase} training"), "")
            self._write(Text.assemble("    > ", (one_line(record.prompt), "italic")))
            self._write(Text(f"    {one_line(record.answer) or '(empty answer)'}"))
        elif isinstance(record, CheckpointRecord):
            # With many participants they would drown the rest; training.log has them.
            if self._level <= (logging.DEBUG if self._many else logging.INFO):
                where = self._named(record.participant, f"step {record.step}")
                self._entry(where, f"checkpoint {record.path}", style="dim")
        elif isinstance(record, MessageRecord):
            self.say(record.level, record.text)
        elif isinstance(record, RunStart):
            self._handle_start(record)
        elif isinstance(record, RunEnd):
            self._handle_end(record)
        elif isinstance(record, ComparisonRecord):
            self._handle_comparison(record)
        else:
            for line in self._rounds.lines(record):
                self._write(line)
            self._refresh(force=True)

    def say(self, level: Level, text: str) -> None:
        """Show a sentence, if its level is high enough."""
        if getattr(logging, level.upper()) >= self._level:
            prefix = f"{level}: " if level in ("warning", "error") else ""
            self._write(Text(prefix + text, style=MESSAGE_STYLES[level]))

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stop_bars()
        atexit.unregister(self._stop_bars)
        for logger in self._loggers:
            logger.removeHandler(self._handler)

    def _handle_start(self, record: RunStart) -> None:
        self._many = len(record.participants) > 1
        self._num_epochs = record.num_epochs
        self._write(Text("Training Configuration:", style="bold"))
        for label, value in record.rows:
            self._write(Text.assemble((f"  {label}: ", "cyan"), value))
        self._write(Text(""))
        self._write(Text("Training Progress:", style="bold"))
        self._progress = {name: Progress(name, record.num_epochs) for name in record.participants}
        self._rounds = RoundView(self._progress, self._clock)
        if self._is_live:
            self._bars = ProgressBars(
                self._rich, self._progress, clock=self._clock, footer=self._rounds.footer
            )

    def _handle_step(self, record: StepRecord) -> None:
        progress = self._progress.setdefault(
            record.participant, Progress(record.participant, self._num_epochs)
        )
        progress.update(record)
        self._rounds.begin()
        if self._bars is not None:
            self._bars.refresh(force=record.step == record.num_steps)
        elif self._is_line_due(progress, record):
            progress.line_at = self._clock()
            progress.line_step = record.step
            line = wording.step_line(record, seconds_left=progress.seconds_left())
            self._write(Text("  " + self._named(record.participant, line)))

    def _refresh(self, *, force: bool = False) -> None:
        if self._bars is not None and self._many:
            self._bars.refresh(force=force)

    def _handle_comparison(self, record: ComparisonRecord) -> None:
        self._stop_bars()
        self._write(Text(""))
        self._write(Text("Did merging help?", style="bold"))
        if self._is_live:
            self._rich.print(comparison_table(record, self._rich.width))
        else:
            for line in round_wording.aligned([record.columns, *record.rows]):
                self._write(Text(line))
        for note in record.notes:
            self._write(Text(note, style="dim"))

    def _is_line_due(self, progress: Progress, record: StepRecord) -> bool:
        """First, last, each tenth of the way, and about every 10 s; less often the longer the run takes."""
        if progress.line_at is None or record.step == record.num_steps or not math.isfinite(record.loss):
            return True
        now = self._clock()
        interval_seconds = max(LINE_INTERVAL_SECONDS, (now - self._began) / 50) * max(1, len(self._progress))
        tenth = max(1.0, record.num_steps / 10)
        return (
            now - progress.line_at >= interval_seconds or record.step // tenth > progress.line_step // tenth
        )

    def _handle_end(self, record: RunEnd) -> None:
        self._stop_bars()
        self._write(Text(""))
        style = STATUS_STYLES[record.status]
        self._write(Text(f"Training {record.status}", style=style))
        if record.error:
            self._write(Text(record.error, style="red"))
        for label, value in record.summary:
            self._write(Text.assemble((f"  {label}: ", "cyan"), value))
        for label, path in record.paths:
            self._write(Text.assemble((f"{label}: ", "bold"), path), fold=False)

    def _entry(self, label: str, text: str, *, style: str = "") -> None:
        self._write(Text.assemble("  ", (label, style or "bold"), "  " if text else "", (text, style)))

    def _named(self, participant: str, text: str) -> str:
        return f"{participant}  {text}" if self._many else text

    def _write(self, text: Text, *, fold: bool = True) -> None:
        """One line; on a terminal it is folded at words with the continuation indented, a path never."""
        if not all(c.isprintable() or c in "\n\t" for c in text.plain):
            text = Text("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text.plain))
        if not self._is_live:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            line = text.plain.encode(encoding, errors="replace").decode(encoding)
            self._stream.write(line + "\n")
            self._stream.flush()
            return
        if not fold:
            self._rich.print(text, soft_wrap=True)
            return
        indent = len(text.plain) - len(text.plain.lstrip()) + 2
        lines = text.wrap(self._rich, max(20, self._rich.width - indent))
        for number, line in enumerate(lines):
            self._rich.print(Text(" " * indent) + line if number else line)

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _LibraryMessages(logging.Handler):
    """Shows what the project's own loggers and Python's warnings say, but not the run's records."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, RUN_RECORD, False):
            return
        try:
            level: Level = "debug"
            for name in ("info", "warning", "error"):
                if record.levelno >= getattr(logging, name.upper()):
                    level = name
            text = record.getMessage().strip()
            # A warning of Python has the line of code that warned below it; that is in training.log.
            self._console.say(level, text.partition("\n")[0] if record.name == "py.warnings" else text)
        except OSError:
            pass  # the terminal is gone, e.g. a pipe that was closed; training.log says so
        except Exception:
            self.handleError(record)


def is_interactive(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that can move its cursor and show the bar's characters."""
    import os

    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    encoding = (getattr(stream, "encoding", None) or "").lower()
    return encoding.startswith("utf") and shutil.get_terminal_size().columns >= 40


def one_line(text: str, limit: int = 600) -> str:
    """``text`` without line breaks and control characters, at most ``limit`` characters."""
    clean = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
