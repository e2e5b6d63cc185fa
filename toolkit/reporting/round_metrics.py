"""What rounds and merges came to, worked out from the history: for the files and for the report."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.reporting.wording import is_metric

if TYPE_CHECKING:
    from toolkit.reporting.history import History, Series

MAX_CURVE_POINTS = 500
CURVE_COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
TREND_EVALUATIONS = 3
# In this order: the one that a person looks at first.
MAIN_METRICS = ("accuracy", "f1", "loss")


def main_metric(names: Sequence[str]) -> str | None:
    """The metric that stands for a participant, without the prefix ``eval_``."""
    known = [name.removeprefix("eval_") for name in names if is_metric(name)]
    return next((name for name in MAIN_METRICS if name in known), known[0] if known else None)


def took(merge: Mapping[str, Any], participant: str) -> bool:
    """Whether the participant went on with what this merge made."""
    is_offered = merge["status"] == "merged" and participant in merge["gate"]
    return is_offered and merge["gate"][participant] != "rejected"


def merge_counts(history: "History") -> dict[str, Any]:
    """How many merges were made, left out and failed; their time in all and as a share of the run's."""
    merges = history.merges
    seconds = math.fsum(float(merge["seconds"]) for merge in merges)
    wall_seconds = math.fsum(session["wall_seconds"] for session in history.sessions)
    verdicts = [
        verdict for merge in merges if merge["status"] == "merged" for verdict in merge["gate"].values()
    ]
    return {
        **{status: sum(m["status"] == status for m in merges) for status in ("merged", "skipped", "failed")},
        "attempts": sum(merge["attempts"] for merge in merges),
        "accepted": sum(verdict != "rejected" for verdict in verdicts),
        "rejected": sum(verdict == "rejected" for verdict in verdicts),
        "seconds": round(seconds, 3),
        "share_of_wall_time": round(seconds / wall_seconds, 4) if wall_seconds else 0.0,
        "triggers": _counts(merge["trigger"] for merge in merges if merge["status"] == "merged"),
    }


def merge_effect(history: "History", participant: str) -> dict[str, Any]:
    """What the merges did to one participant.

    Returns:
        ``accepted``, ``rejected``: how many; ``last_epoch``: of the last one it took; ``mean_change``: metric name to
        the mean of after - before over those it took; ``mean_change_rejected``: the same over those refused.
    """
    made = [m for m in history.merges if m["status"] == "merged" and participant in m["gate"]]
    accepted = [merge for merge in made if took(merge, participant)]
    rejected = [merge for merge in made if not took(merge, participant)]
    return {
        "accepted": len(accepted),
        "rejected": len(rejected),
        "last_epoch": accepted[-1]["epoch"] if accepted else None,
        "mean_change": _mean_changes(accepted, participant),
        "mean_change_rejected": _mean_changes(rejected, participant),
    }


def trend(history: "History", participant: str) -> dict[str, float | None]:
    """Where a participant is heading: change of its training loss over its last epoch, of its metric lately.

    Returns:
        ``train_loss_change_of_last_epoch``: mean loss of the last epoch - that of the one before;
        ``metric_change_per_evaluation``: of the main metric over the last 3 evaluations.
    """
    series = history.series.get(participant)
    loss_change = None if series is None else _last_epoch_change(series)
    values = [value for _, _, value in metric_points(history, participant)][-TREND_EVALUATIONS:]
    metric_change = (values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else None
    return {"train_loss_change_of_last_epoch": loss_change, "metric_change_per_evaluation": metric_change}


def metric_points(
    history: "History", participant: str, metric: str | None = None
) -> list[tuple[float, int, float]]:
    """(epoch, step, value) of one metric, the main one by default, of the weights that the participant had.

    What a merge gave it comes after the evaluation at the same step.
    """
    points = []
    for entry in evaluations_and_merges(history, participant):
        plain_names = {name.removeprefix("eval_"): value for name, value in entry["metrics"].items()}
        metric = metric or main_metric(list(plain_names))
        if metric is not None and metric in plain_names:
            points.append((float(entry["epoch"]), entry["step"], float(plain_names[metric])))
    return points


def evaluations_and_merges(history: "History", participant: str) -> list[Mapping[str, Any]]:
    """A participant's evaluations in order, and after those at its step what a merge made of it, as one more."""
    entries = [entry for entry in history.evaluations if entry["participant"] == participant]
    for merge in history.merges:
        if took(merge, participant) and merge["after"].get(participant):
            step, epoch = merge["steps"].get(participant, 0), merge["epoch"]
            entries.append(
                {"step": step, "epoch": epoch, "phase": "merged", "metrics": merge["after"][participant]}
            )
    return sorted(entries, key=lambda entry: entry["step"])


def curve(series: "Series") -> dict[str, list[float | None]]:
    """The columns of a participant's steps, at most 500 of them evenly spaced; all are in training_history.json."""
    stride = max(1, math.ceil(len(series) / MAX_CURVE_POINTS))
    # The last step is always among them.
    places = range((len(series) - 1) % stride, len(series), stride)
    return {name: [_known(series[name][place]) for place in places] for name in CURVE_COLUMNS}


def alert_counts(history: "History") -> dict[str, int]:
    """Kind to how often."""
    return _counts(alert["kind"] for alert in history.alerts)


def status_of(history: "History", participant: str) -> tuple[str, str | None]:
    """``active``, ``stopped``, ``failed`` or, at the end of the run, ``done``; and why it left."""
    last = history.rounds[-1] if history.rounds else {"failed": {}, "stopped": {}}
    for status in ("failed", "stopped"):
        if participant in last[status]:
            return status, last[status][participant]
    return ("done" if history.facts["status"] == "done" else "active"), None


def _mean_changes(merges: Sequence[Mapping[str, Any]], participant: str) -> dict[str, float]:
    changes: dict[str, list[float]] = {}
    for merge in merges:
        before, after = merge["before"].get(participant, {}), merge["after"].get(participant, {})
        for name in before:
            if name in after and is_metric(name):
                changes.setdefault(name.removeprefix("eval_"), []).append(
                    float(after[name]) - float(before[name])
                )
    return {name: math.fsum(values) / len(values) for name, values in changes.items()}


def _last_epoch_change(series: "Series") -> float | None:
    last_epoch = series["epoch"][-1]
    means = []
    for first in (last_epoch - 1, last_epoch - 2):
        pairs = zip(series["epoch"], series["loss"], strict=True)
        losses = [loss for epoch, loss in pairs if first < epoch <= first + 1 and math.isfinite(loss)]
        if not losses:
            return None
        means.append(math.fsum(losses) / len(losses))
    return means[0] - means[1]


def _counts(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _known(value: float) -> float | None:
    """NaN is "not measured" in the columns, but a loss that was lost is told apart by the alerts."""
    return None if math.isnan(value) else int(value) if value.is_integer() and abs(value) > 1 else value
