"""The listener that keeps a run's history and writes it."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from toolkit.durable import write_json, write_text
from toolkit.reporting.history import HISTORY_NAME, METRICS_NAME, History, now_utc, plain
from toolkit.reporting.metrics import summarize
from toolkit.reporting.pace import Pace
from toolkit.reporting.records import (
    AlertRecord,
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    MergeRecord,
    Record,
    RoundRecord,
    RunEnd,
    RunStart,
    SampleRecord,
    StepRecord,
)


class HistoryWriter:
    """Listener that keeps the :class:`History` and writes it, not at every step of a fast run.

    The files are written at most every two seconds while steps come in, soon after an evaluation or a
    checkpoint, and at every :meth:`flush`; a history that takes long to write is written more seldom (at
    most 5 % of the time).

    Args:
        run_dir: exists.
        logging_steps: every how many steps one is recorded, besides the first, the last and every non-finite
            one.
        restored_steps: see :func:`toolkit.reporting.listeners.build`.
    """

    def __init__(
        self, run_dir: Path, *, logging_steps: int = 1, restored_steps: Mapping[str, int] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._logging_steps = logging_steps
        path = run_dir / HISTORY_NAME
        self.history = History() if restored_steps is None else History.load(path, restored_steps)
        self._pace = Pace(interval_seconds=2.0, max_share=0.05)
        self._started = time.monotonic()
        # Until something happened, the files of an earlier run in the folder stay as they are.
        self._has_news = False
        self._session = {
            "started": now_utc(),
            "wall_seconds": 0.0,
            "resumed_from": dict(restored_steps or {}),
        }
        self.history.sessions.append(self._session)

    def handle(self, record: Record) -> None:
        history = self.history
        if isinstance(record, StepRecord):
            if self._is_recorded(record):
                history.add_step(record)
                self._has_news = True
                if self._pace.is_due():
                    self.flush()
            return
        if isinstance(record, RunStart):
            names = list(dict.fromkeys([*history.facts["participants"], *record.participants]))
            history.facts |= {"recipe": record.recipe, "title": record.title, "num_steps": record.num_steps}
            history.facts["participants"] = names
            history.rows, history.data_check = record.rows, record.data_check
        elif isinstance(record, EvaluationRecord):
            history.add_evaluation(record)
        elif isinstance(record, SampleRecord):
            history.add_sample(record)
        elif isinstance(record, CheckpointRecord):
            history.add_checkpoint(record)
        elif isinstance(record, MergeRecord):
            history.add_merge(record)
        elif isinstance(record, RoundRecord):
            history.add_round(record)
        elif isinstance(record, AlertRecord):
            history.add_alert(record)
        elif isinstance(record, ComparisonRecord):
            history.set_comparison(record)
        elif isinstance(record, RunEnd):
            history.facts["status"] = record.status
            history.end = record
        else:
            return
        self._has_news = True
        if isinstance(record, RunEnd) or self._pace.is_due(urgent=True):
            self.flush()

    def flush(self) -> None:
        """Write both files now, if anything was handled."""
        if not self._has_news:
            return
        self._session["wall_seconds"] = round(time.monotonic() - self._started, 3)
        with self._pace.measured():
            write_text(self._run_dir / HISTORY_NAME, self.history.text())
            write_json(self._run_dir / METRICS_NAME, plain(summarize(self.history)))

    def close(self) -> None:
        if self.history.facts["status"] == "running":
            self.history.facts["status"] = "failed"
        self.flush()

    def _is_recorded(self, record: StepRecord) -> bool:
        regular = (
            record.step == 1 or record.step == record.num_steps or record.step % self._logging_steps == 0
        )
        return regular or not math.isfinite(record.loss)
