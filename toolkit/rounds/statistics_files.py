"""The files of an iterative run that tell its story: each a view of the history, complete at any time.

- ``merge_history.json``: every merge with its weights, the decision behind it, the gate's verdicts and the metrics of
  every participant before and after it.
- ``state_summary.json``: where each participant stands.
- ``final_statistics.json``: what came out, with the comparison; written all along, so that it is there after a kill.
- ``training_alerts.json``: the alerts.

All are strict JSON with training_history.json as their only source: a resumed run has nothing twice and misses nothing.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.durable import write_text
from toolkit.reporting.history import History, plain
from toolkit.reporting.metrics import LOWER_IS_BETTER, summarize
from toolkit.reporting.pace import Pace
from toolkit.reporting.records import MessageRecord, Record, RunEnd, SampleRecord, StepRecord
from toolkit.reporting.round_metrics import (
    alert_counts,
    merge_counts,
    merge_effect,
    metric_points,
    status_of,
    took,
    trend,
)
from toolkit.reporting.wording import is_metric

FORMAT_VERSION = 1


def merge_history(history: History) -> dict[str, Any]:
    """Content of merge_history.json."""
    return {"format": FORMAT_VERSION, **merge_counts(history), "merges": history.merges}


def state_summary(history: History) -> dict[str, Any]:
    """Content of state_summary.json."""
    last = history.rounds[-1] if history.rounds else None
    return {
        "format": FORMAT_VERSION,
        "recipe": history.facts["recipe"],
        "status": history.facts["status"],
        "round": last["round"] if last else 0,
        "epoch": last["epoch"] if last else 0,
        "num_epochs": last["num_epochs"] if last else None,
        "merges": merge_counts(history),
        "last_decision": last["decision"] if last else None,
        "alerts": alert_counts(history),
        "participants": {name: _participant_state(history, name) for name in history.facts["participants"]},
    }


def final_statistics(history: History) -> dict[str, Any]:
    """Content of final_statistics.json."""
    totals = summarize(history)
    parts = totals.pop("participants")
    end, comparison = history.end, history.comparison or {}
    return {
        "format": FORMAT_VERSION,
        **totals,
        "participants": {
            name: {
                "status": status_of(history, name)[0],
                "steps": parts[name]["steps"] if name in parts else 0,
                "train_loss": parts[name]["mean_train_loss_of_last_tenth"] if name in parts else None,
                "evaluation": _first_best_last(history, name),
                "merges": merge_effect(history, name),
                "trend": trend(history, name),
            }
            for name in history.facts["participants"]
        },
        "comparison": comparison.get("comparison"),
        "verdicts": comparison.get("verdicts"),
        "paths": {} if end is None else dict(end.paths),
        "error": None if end is None else end.error,
    }


def training_alerts(history: History) -> dict[str, Any]:
    """Content of training_alerts.json."""
    return {"format": FORMAT_VERSION, "counts": alert_counts(history), "alerts": history.alerts}


FILES: dict[str, Callable[[History], dict[str, Any]]] = {
    "merge_history.json": merge_history,
    "state_summary.json": state_summary,
    "final_statistics.json": final_statistics,
    "training_alerts.json": training_alerts,
}


class StatisticsFiles:
    """Listener that writes the files from the history, after the listener that fills it.

    They are written soon after anything but a step, at every :meth:`flush`, and at the end; a file whose content is as
    it was is left alone.

    Args:
        run_dir: exists.
        history: filled by the listener before this one.
    """

    def __init__(self, run_dir: Path, history: History) -> None:
        self._run_dir = run_dir
        self._history = history
        self._pace = Pace(interval_seconds=2.0, max_share=0.02)
        self._written: dict[str, str] = {}
        # Until something happened, the files of an earlier run in the folder stay as they are.
        self._has_news = False

    def handle(self, record: Record) -> None:
        if isinstance(record, MessageRecord | SampleRecord):
            return
        self._has_news = True
        is_step = isinstance(record, StepRecord)
        if isinstance(record, RunEnd) or (not is_step and self._pace.is_due(urgent=True)):
            self.flush()

    def flush(self) -> None:
        """Write the files now, if anything was handled."""
        if not self._has_news:
            return
        with self._pace.measured():
            for name, content in FILES.items():
                text = json.dumps(
                    plain(content(self._history)), indent=2, ensure_ascii=False, allow_nan=False
                )
                if self._written.get(name) != text:
                    write_text(self._run_dir / name, text + "\n")
                    self._written[name] = text

    def close(self) -> None:
        self.flush()


def _participant_state(history: History, name: str) -> dict[str, Any]:
    series = history.series.get(name)
    status, reason = status_of(history, name)
    checkpoints = [entry for entry in history.checkpoints if entry["participant"] == name]
    merges = [merge for merge in history.merges if took(merge, name)]
    weights = merges[-1]["weights"] if merges else {}
    return {
        "status": status,
        "reason": reason,
        "step": int(series["step"][-1]) if series else 0,
        "num_steps": history.facts["num_steps"],
        "epoch": series["epoch"][-1] if series else 0.0,
        "train_loss": series["loss"][-1] if series else None,
        "evaluation": _first_best_last(history, name),
        "merges": merge_effect(history, name),
        # Where all get one model there is one row of weights.
        "last_weights": weights.get(name, next(iter(weights.values()), {}) if len(weights) == 1 else {}),
        "num_checkpoints": len(checkpoints),
        "last_checkpoint": checkpoints[-1]["path"] if checkpoints else None,
    }


def _first_best_last(history: History, name: str) -> dict[str, dict[str, float]]:
    """Metric name to its first, best and last value with the epochs, merges that the participant took included."""
    found: dict[str, dict[str, float]] = {}
    for metric in _metric_names(history, name):
        points = [(epoch, value) for epoch, _, value in metric_points(history, name, metric)]
        (first_epoch, first), (last_epoch, last) = points[0], points[-1]
        lower = any(word in metric for word in LOWER_IS_BETTER)
        finite = [(epoch, value) for epoch, value in points if math.isfinite(value)] or points
        best_epoch, best = (min if lower else max)(finite, key=lambda point: point[1])
        found[metric] = {
            **{"first": first, "first_epoch": first_epoch, "best": best},
            **{"best_epoch": best_epoch, "last": last, "last_epoch": last_epoch},
        }
    return found


def _metric_names(history: History, name: str) -> list[str]:
    names = [
        metric.removeprefix("eval_")
        for entry in history.evaluations
        if entry["participant"] == name
        for metric in entry["metrics"]
        if is_metric(metric)
    ]
    return list(dict.fromkeys(names))
