"""training.log: every record of a run, and what the libraries say meanwhile, with UTC times."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.reporting import round_wording, wording
from toolkit.reporting.records import (
    AlertRecord,
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    MergeRecord,
    MessageRecord,
    Record,
    RoundRecord,
    RunEnd,
    RunStart,
    SampleRecord,
    StepRecord,
)

# Records of the run carry this attribute: the console shows them in its own way and skips them here.
RUN_RECORD = "meldkit_run_record"
STEP_RECORD = "meldkit_step_record"
LIBRARIES = ("py.warnings", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "torch")


def formatter() -> logging.Formatter:
    """``2026-01-31T12:00:00.000Z INFO toolkit.run: text``; further lines of a text are indented."""
    form = _IndentingFormatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    form.converter = time.gmtime
    return form


class _IndentingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


class LogFile:
    """Listener that writes training.log through the logger ``toolkit``, which it owns until it is closed.

    The file is appended to (a resumed run goes on in it) and flushed at each line. Warnings of Python and of
    the libraries (level WARNING and above) are in it too.

    Args:
        path: the file; its folder exists.
        level: name of the lowest level that is written, e.g. ``INFO``.
        logging_steps: every how many steps one is written.
        train_loss: gives the training loss that belongs to an evaluation.
        story_path: a second file, for everything but the steps; None: no such file.
    """

    def __init__(
        self,
        path: Path,
        *,
        level: str,
        logging_steps: int = 1,
        train_loss: Callable[[EvaluationRecord], float | None] = lambda _: None,
        story_path: Path | None = None,
    ) -> None:
        self._logging_steps = logging_steps
        self._train_loss = train_loss
        self._num_epochs: float | None = None
        self._many = False
        self._departed: set[str] = set()
        self._logger = logging.getLogger("toolkit.run")
        self._handlers = [_appending(path)]
        if story_path is not None:
            self._handlers.append(_appending(story_path))
            self._handlers[-1].addFilter(lambda record: not getattr(record, STEP_RECORD, False))
        self._owned = logging.getLogger("toolkit")
        self._level_before = self._owned.level
        self._owned.setLevel(level)
        self._library_handlers = [_Passing(handler, logging.WARNING) for handler in self._handlers]
        for handler, library_handler in zip(self._handlers, self._library_handlers, strict=True):
            self._owned.addHandler(handler)
            for name in LIBRARIES:
                logging.getLogger(name).addHandler(library_handler)
        # Warnings go to the log from here on; the terminal shows them through the console.
        logging.captureWarnings(True)

    def handle(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            ends = record.step in (1, record.num_steps)
            if ends or record.step % self._logging_steps == 0 or not math.isfinite(record.loss):
                norm = "" if record.grad_norm is None else f"  grad norm {wording.number(record.grad_norm)}"
                self._say(
                    logging.INFO,
                    self._named(record.participant, wording.step_line(record, seconds_left=None) + norm),
                    is_step=True,
                )
        elif isinstance(record, EvaluationRecord):
            label = wording.evaluation_label(record, self._num_epochs)
            metrics = wording.evaluation_metrics(record.metrics, self._train_loss(record))
            text = f"evaluation at step {record.step} ({label}): {metrics} [{record.seconds:.1f} s]"
            self._say(logging.INFO, self._named(record.participant, text))
        elif isinstance(record, SampleRecord):
            text = f"sample {record.phase} training\nprompt: {record.prompt}\nanswer: {record.answer}"
            self._say(logging.INFO, self._named(record.participant, text))
        elif isinstance(record, CheckpointRecord):
            self._say(
                logging.INFO,
                self._named(record.participant, f"checkpoint at step {record.step}: {record.path}"),
            )
        elif isinstance(record, MessageRecord):
            self._say(getattr(logging, record.level.upper()), record.text)
        elif isinstance(record, RunStart):
            self._num_epochs = record.num_epochs
            self._many = len(record.participants) > 1
            rows = "".join(f"\n{label}: {value}" for label, value in record.rows)
            self._say(logging.INFO, f"run of {record.recipe} starts: {record.title}{rows}")
        elif isinstance(record, RunEnd):
            self._handle_end(record)
        else:
            self._handle_round(record)

    def _handle_round(self, record: MergeRecord | RoundRecord | AlertRecord | ComparisonRecord) -> None:
        level = logging.INFO
        if isinstance(record, MergeRecord):
            lines = round_wording.merge_lines(record, is_complete=True)
            level = logging.WARNING if record.status == "failed" else logging.INFO
        elif isinstance(record, RoundRecord):
            lines = round_wording.round_lines(record)
            departures = round_wording.departures(record, self._departed)
            self._departed |= {name for name, _ in departures}
            lines += [f"{name} {why}" for name, why in departures]
        elif isinstance(record, AlertRecord):
            lines, level = [round_wording.alert_line(record)], logging.WARNING
        else:
            lines = ["comparison", *round_wording.comparison_lines(record)]
        self._say(level, "\n".join(lines))

    def _handle_end(self, record: RunEnd) -> None:
        lines = [f"run {record.status}", *([record.error] if record.error else [])]
        lines += [f"{label}: {value}" for label, value in [*record.summary, *record.paths]]
        self._say(logging.INFO if record.status == "done" else logging.ERROR, "\n".join(lines))

    def flush(self) -> None:
        for handler in self._handlers:
            handler.flush()

    def close(self) -> None:
        self._owned.setLevel(self._level_before)
        for handler, library_handler in zip(self._handlers, self._library_handlers, strict=True):
            self._owned.removeHandler(handler)
            for name in LIBRARIES:
                logging.getLogger(name).removeHandler(library_handler)
            handler.close()
        logging.captureWarnings(False)

    def _named(self, participant: str, text: str) -> str:
        return f"{participant}: {text}" if self._many else text

    def _say(self, level: int, text: str, *, is_step: bool = False) -> None:
        self._logger.log(level, "%s", text, extra={RUN_RECORD: True, STEP_RECORD: is_step})


def _appending(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(formatter())
    return handler


class _Passing(logging.Handler):
    """Hands records of at least ``level`` to another handler."""

    def __init__(self, target: logging.Handler, level: int) -> None:
        super().__init__(level)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        self._target.handle(record)
