"""The curves of the report: loss, the metrics of evaluations, and what was measured of every step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from toolkit.reporting import charts, report_rounds, wording
from toolkit.reporting.history import History
from toolkit.reporting.round_metrics import metric_points

# With more participants the unsmoothed losses would hide the smoothed ones.
MAX_RAW_SERIES = 3
NOISY_COLUMNS = ("grad_norm", "tokens_per_second", "utilization_percent", "power_watts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    note: str
    svg: Markup


def curves(history: History) -> list[Chart]:
    """Every chart that has something to show."""
    wanted = [
        ("learning rate", "", "learning_rate", 1),
        ("gradient norm", "before clipping", "grad_norm", 1),
        ("tokens a second", "", "tokens_per_second", 1),
        ("peak memory", "GB", "memory_bytes", 1e-9),
        ("GPU utilisation", "%", "utilization_percent", 1),
        ("GPU power", "W", "power_watts", 1),
    ]
    all_series, x_name = series_in_order(history), _x_name(history)
    drawn = [_loss_chart(history), *_metric_charts(history)]
    for title, note, column, factor in wanted:
        raw, smooth = [], []
        for colour, (name, series) in enumerate(all_series):
            points = [(x, y * factor) for x, y in zip(series[x_name], series[column], strict=True)]
            raw.append(charts.Line(name=name, colour=colour, points=points))
            smooth.append(dataclasses.replace(raw[-1], points=charts.smoothed(points)))
        if column in NOISY_COLUMNS:
            faint = [dataclasses.replace(line, style="faint") for line in raw]
            raw = [*(faint if len(faint) <= MAX_RAW_SERIES else []), *smooth]
            note = ", ".join(filter(None, [note, "smoothed"]))
        drawn.append(_chart(history, raw, title, note, from_zero=True))
    return [chart for chart in drawn if chart.svg]


def _loss_chart(history: History) -> Chart:
    all_series = series_in_order(history)
    raw, smooth = [], []
    for colour, (name, series) in enumerate(all_series):
        points = list(zip(series[_x_name(history)], series["loss"], strict=True))
        raw.append(charts.Line(name=name, colour=colour, points=points, style="faint"))
        smooth.append(charts.Line(name=f"{name}, training", colour=colour, points=charts.smoothed(points)))
    held_out = _evaluation_lines(history, "loss")
    note = "training (line, smoothed)" + (", held out (dots)" if held_out else "")
    lines = [*(raw if len(raw) <= MAX_RAW_SERIES else []), *smooth, *held_out]
    return _chart(history, lines, "loss", note)


def _metric_charts(history: History) -> list[Chart]:
    """A chart for each other metric of the evaluations."""
    names = dict.fromkeys(name.removeprefix("eval_") for e in history.evaluations for name in e["metrics"])
    return [
        _chart(history, _evaluation_lines(history, name, joined=True), name.replace("_", " "), "held out")
        for name in names
        if name != "loss" and wording.is_metric(name)
    ]


def _evaluation_lines(history: History, metric: str, *, joined: bool = False) -> list[charts.Line]:
    lines = []
    for colour, (name, _) in enumerate(series_in_order(history)):
        by_epoch = history.is_iterative
        points = [(epoch if by_epoch else step, y) for epoch, step, y in metric_points(history, name, metric)]
        for style in ("line", "points") if joined else ("points",):
            lines.append(charts.Line(name=f"{name}, held out", colour=colour, points=points, style=style))
    return [line for line in lines if line.points]


def _x_name(history: History) -> str:
    """Participants with different numbers of rows are at the same epoch when they are merged, not at the same step."""
    return "epoch" if history.is_iterative else "step"


def _chart(
    history: History, lines: Sequence[charts.Line], title: str, note: str, *, from_zero: bool = False
) -> Chart:
    rules = report_rounds.merge_rules(history)
    svg = charts.line_chart(lines, label=title, x_name=_x_name(history), from_zero=from_zero, rules=rules)
    # Every text inside is escaped by the chart module.
    return Chart(title=title, note=note, svg=Markup(svg))


def series_in_order(history: History) -> list[tuple[str, Any]]:
    names = dict.fromkeys([*history.facts["participants"], *history.series])
    return [(name, history.series[name]) for name in names if name in history.series]
