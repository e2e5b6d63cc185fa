"""training_metrics.json: a run in a page of numbers, worked out from its history."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.reporting import round_metrics

if TYPE_CHECKING:
    from toolkit.reporting.history import History, Series

LOWER_IS_BETTER = ("loss", "perplexity")


def quantile(values: Sequence[float], share: float) -> float | None:
    """The ``share`` quantile of sorted ``values`` by linear interpolation; None for no values."""
    if not values:
        return None
    position = share * (len(values) - 1)
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Median, 10 % and 90 % quantile of the finite ``values``."""
    ordered = sorted(value for value in values if math.isfinite(value))
    names = {"p10": 0.1, "median": 0.5, "p90": 0.9}
    return {name: _rounded(quantile(ordered, share), 6) for name, share in names.items()}


def summarize(history: "History") -> dict[str, Any]:
    """Everything in training_metrics.json. A number that is not known is None; NaN and infinity stay."""
    names = [name for name in history.facts["participants"] if name in history.series]
    names += [name for name in history.series if name not in names]
    all_series = [history.series[name] for name in names]
    return {
        **{name: history.facts[name] for name in ("recipe", "title", "status", "num_steps")},
        "started": history.sessions[0]["started"] if history.sessions else None,
        "num_sessions": len(history.sessions),
        "wall_seconds": round(math.fsum(session["wall_seconds"] for session in history.sessions), 3),
        "total_steps": sum(_last(s, "step") or 0 for s in all_series),
        "total_tokens": sum(_last(s, "total_tokens") or 0 for s in all_series),
        "total_trainable_tokens": sum(_last(s, "total_trainable_tokens") or 0 for s in all_series),
        "tokens_per_second": spread(v for s in all_series for v in s["tokens_per_second"][1:]),
        "peak_memory_bytes": max(
            (peak for s in all_series if (peak := _peak(s["memory_bytes"]))), default=None
        ),
        "gpu": _gpu_means(all_series),
        "participants": {
            name: _participant(history.series[name], round_metrics.evaluations_and_merges(history, name))
            | (_part_in_rounds(history, name) if history.is_iterative else {})
            for name in names
        },
        **(_rounds(history) if history.is_iterative else {}),
    }


def _rounds(history: "History") -> dict[str, Any]:
    return {
        "num_rounds": len(history.rounds),
        "merges": round_metrics.merge_counts(history),
        "alerts": round_metrics.alert_counts(history),
    }


def _part_in_rounds(history: "History", name: str) -> dict[str, Any]:
    return {
        "status": round_metrics.status_of(history, name)[0],
        "merges": round_metrics.merge_effect(history, name),
        "trend": round_metrics.trend(history, name),
        "curve": round_metrics.curve(history.series[name]),
    }


def _participant(series: "Series", evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = series["loss"]
    finite = [(loss, step) for loss, step in zip(losses, series["step"], strict=True) if math.isfinite(loss)]
    best_loss, best_step = min(finite, default=(None, None))
    return {
        "steps": _last(series, "step"),
        "epochs": _rounded(series["epoch"][-1], 4),
        "first_train_loss": losses[0],
        "final_train_loss": losses[-1],
        # The mean over the last tenth says more than one step of a noisy curve.
        "mean_train_loss_of_last_tenth": _mean(losses[-max(1, len(losses) // 10) :]),
        "best_train_loss": best_loss,
        "best_train_loss_step": None if best_step is None else int(best_step),
        "num_non_finite_losses": len(losses) - len(finite),
        "evaluation": _evaluation(evaluations),
        "total_tokens": _last(series, "total_tokens"),
        "total_trainable_tokens": _last(series, "total_trainable_tokens"),
        # Recorded steps stand for those between them (--logging-steps).
        "train_seconds": _rounded(math.fsum(series["step_seconds"]) * series["step"][-1] / len(series), 3),
        # The first step pays for compilation, caches and the allocator.
        "tokens_per_second": spread(series["tokens_per_second"][1:]),
        "step_seconds": spread(series["step_seconds"][1:]),
        "peak_memory_bytes": _peak(series["memory_bytes"]),
        "gpu": _gpu_means([series]),
    }


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metric name to its values before training, at the end and at its best, with the step of the best."""
    summary: dict[str, dict[str, Any]] = {}
    for entry in evaluations:
        for name, value in entry["metrics"].items():
            metric = summary.setdefault(
                name, {"before": None, "final": None, "best": None, "best_step": None}
            )
            if entry["phase"] == "before":
                metric["before"] = value
            else:
                metric["final"] = value
            number = float(value)
            best = metric["best"]
            lower = any(word in name for word in LOWER_IS_BETTER)
            if math.isfinite(number) and (best is None or (number < best if lower else number > best)):
                metric["best"], metric["best_step"] = number, entry["step"]
    return summary


def _gpu_means(all_series: Sequence["Series"]) -> dict[str, float | None] | None:
    means = {
        "mean_utilization_percent": _mean(v for s in all_series for v in s["utilization_percent"]),
        "mean_power_watts": _mean(v for s in all_series for v in s["power_watts"]),
        "peak_memory_used_bytes": max(
            (p for s in all_series if (p := _peak(s["memory_used_bytes"]))), default=None
        ),
    }
    return means if any(value is not None for value in means.values()) else None


def _mean(values: Iterable[float]) -> float | None:
    """Mean of what was measured (NaN is not measured, or lost); None for nothing."""
    measured = [value for value in values if not math.isnan(value)]
    return _rounded(sum(measured) / len(measured), 6) if measured else None


def _peak(values: Iterable[float]) -> int | None:
    peak = max((value for value in values if math.isfinite(value)), default=None)
    return None if peak is None else int(peak)


def _last(series: "Series", column: str) -> int | None:
    return int(series[column][-1]) if len(series) else None


def _rounded(value: float | None, digits: int) -> float | None:
    return value if value is None else round(value, digits)
