"""Watches a run of several participants: the numbers of each, and alerts when something goes wrong."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from toolkit.reporting import listeners
from toolkit.reporting.history import History
from toolkit.reporting.records import (
    AlertRecord,
    EvaluationRecord,
    MergeRecord,
    Record,
    RoundRecord,
    RunStart,
    StepRecord,
)
from toolkit.rounds.alert_rules import HIGHER_IS_BETTER, AlertRules, AlertThresholds
from toolkit.rounds.statistics_files import StatisticsFiles

LOG_NAME = "iterative_training.log"


@dataclass(slots=True, kw_only=True)
class ParticipantNumbers:
    """Where a participant stands.

    Attributes:
        status: ``active``, ``stopped`` (early) or ``failed``.
        metrics: the newest on its held-out rows, of the weights that it has.
        best: the best so far of the metrics for which more is better.
        num_accepted, num_rejected: merges whose result it took, and those that the gate refused.
    """

    status: str = "active"
    step: int = 0
    epoch: float = 0.0
    train_loss: float = math.nan
    tokens_per_second: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    num_accepted: int = 0
    num_rejected: int = 0


class EnhancedMonitor:
    """Listener that keeps the numbers of every participant and raises alerts (:mod:`toolkit.rounds.alert_rules`).

    Args:
        thresholds: when an alert is raised.
        emit: is given each alert, e.g. the composite's ``handle``; None: they are only kept.
        memory_limit_bytes: memory that there is; None: asked of the system.

    Attributes:
        participants: name to numbers.
        alerts: oldest first, also those that the run itself raised.
    """

    def __init__(
        self,
        thresholds: AlertThresholds | None = None,
        *,
        emit: Callable[[AlertRecord], None] | None = None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self.emit = emit
        self.participants: dict[str, ParticipantNumbers] = {}
        self.alerts: list[AlertRecord] = []
        self._is_replaying = False
        self._rules = AlertRules(
            thresholds or AlertThresholds(), self._raise, memory_limit_bytes=memory_limit_bytes
        )

    def handle(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._handle_step(record)
        elif isinstance(record, EvaluationRecord):
            self._handle_metrics(record.participant, record.step, record.metrics, "training")
        elif isinstance(record, MergeRecord):
            self._handle_merge(record)
        elif isinstance(record, RoundRecord):
            self._handle_round(record)
        elif isinstance(record, RunStart):
            for name in record.participants:
                self._numbers(name)
        elif isinstance(record, AlertRecord) and record not in self.alerts:
            self.alerts.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def summary(self) -> dict[str, Any]:
        """The numbers of all participants and the alerts, as plain dictionaries."""
        return {
            "participants": {name: asdict(numbers) for name, numbers in self.participants.items()},
            "alerts": [asdict(alert) for alert in self.alerts],
        }

    def restore(self, history: History) -> "EnhancedMonitor":
        """Take up the numbers of a run that is resumed; what was said then is not said again.

        The losses are those that the history holds: with ``--logging-steps`` over 1 the rules see fewer of them.
        """
        self._is_replaying = True
        for name, series in history.series.items():
            for loss in series["loss"]:
                self._rules.watch_train_loss(name, 0, loss)
            numbers = self._numbers(name)
            numbers.step, numbers.epoch = int(series["step"][-1]), series["epoch"][-1]
            numbers.train_loss = series["loss"][-1]
            numbers.tokens_per_second = series["tokens_per_second"][-1]
        for record in history.events():
            self.handle(record)
        self._is_replaying = False
        return self

    def _numbers(self, name: str) -> ParticipantNumbers:
        return self.participants.setdefault(name, ParticipantNumbers())

    def _handle_step(self, record: StepRecord) -> None:
        numbers = self._numbers(record.participant)
        numbers.step, numbers.epoch = record.step, record.epoch
        numbers.train_loss, numbers.tokens_per_second = record.loss, record.tokens_per_second
        self._rules.watch_train_loss(record.participant, record.step, record.loss)
        self._rules.watch_memory(record.participant, record.step, record.memory_bytes)

    def _handle_metrics(self, name: str, step: int, metrics: Mapping[str, float], source: str) -> None:
        numbers = self._numbers(name)
        numbers.metrics = {metric.removeprefix("eval_"): value for metric, value in metrics.items()}
        for metric in HIGHER_IS_BETTER:
            if metric in numbers.metrics:
                value = numbers.metrics[metric]
                numbers.best[metric] = max(value, numbers.best.get(metric, value))
        self._rules.watch_metrics(name, step, numbers.metrics, source)

    def _handle_merge(self, record: MergeRecord) -> None:
        if record.status == "failed":
            times = "once" if record.attempts == 1 else f"{record.attempts} times"
            self._raise(
                AlertRecord(
                    kind="merge_failed",
                    participant=None,
                    step=max(record.steps.values(), default=None),
                    message=f"the merge after epoch {record.epoch} was tried {times} and failed: {record.error}",
                    values={"epoch": record.epoch, "attempts": record.attempts},
                )
            )
        if record.status != "merged":
            return
        for name, verdict in record.gate.items():
            numbers = self._numbers(name)
            numbers.num_rejected += verdict == "rejected"
            numbers.num_accepted += verdict != "rejected"
            if verdict != "rejected" and name in record.after:
                self._handle_metrics(name, record.steps.get(name, 0), record.after[name], "the merge")

    def _handle_round(self, record: RoundRecord) -> None:
        for status, names in (("active", record.active), ("stopped", record.stopped)):
            for name in names:
                self._numbers(name).status = status
        for name, error in record.failed.items():
            numbers = self._numbers(name)
            # The run may have said it itself, right when it happened.
            if not any(a.kind == "participant_failed" and a.participant == name for a in self.alerts):
                self._raise(
                    AlertRecord(
                        kind="participant_failed",
                        participant=name,
                        step=numbers.step,
                        message=f"{name} is left out after an error in epoch {record.epoch}: {error}",
                        values={"epoch": record.epoch},
                    )
                )
            numbers.status = "failed"

    def _raise(self, alert: AlertRecord) -> None:
        if self._is_replaying:
            return
        self.alerts.append(alert)
        if self.emit is not None:
            self.emit(alert)


def build_listeners(
    run_dir: Path,
    config: listeners.ReportingConfig,
    *,
    is_main_process: bool,
    resumed_history: Mapping[str, int] | None = None,
    stream: TextIO | None = None,
    thresholds: AlertThresholds | None = None,
) -> tuple[listeners.Listeners, EnhancedMonitor]:
    """What :func:`toolkit.reporting.listeners.build` makes, with the monitor and the files of an iterative run.

    Args:
        resumed_history: as there; participants that failed or stopped before are named too.

    Returns:
        The composite, and the monitor in it.
    """
    monitor = EnhancedMonitor(thresholds)
    composite = listeners.build(
        run_dir,
        config,
        is_main_process=is_main_process,
        resumed_history=resumed_history,
        stream=stream,
        story_name=LOG_NAME,
        watchers=lambda history: (monitor.restore(history), StatisticsFiles(run_dir, history)),
    )
    monitor.emit = composite.handle
    return composite, monitor
