"""The part of the report that only a run in rounds has: comparison, merges, weights, a chart for each, alerts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from toolkit.reporting import charts, wording
from toolkit.reporting.heat_map import heat_map
from toolkit.reporting.history import History
from toolkit.reporting.round_metrics import main_metric, merge_counts, metric_points, status_of, took
from toolkit.reporting.round_wording import names_in_short

MAX_HEAT_MAPS = 6
VERDICTS = ("helped", "no difference", "hurt")


def sections(history: History) -> dict[str, Any] | None:
    """What the template draws; None where the run has no rounds."""
    if not history.is_iterative:
        return None
    return {
        "comparison": history.comparison,
        "merges": [_merge_row(history, merge) for merge in history.merges],
        "weights": _weights(history),
        "participants": _small_multiples(history),
        "alerts": history.alerts,
    }


def tiles(history: History) -> list[tuple[str, str]]:
    """The figures at the top that only a run in rounds has: label and value."""
    if not history.is_iterative:
        return []
    found = []
    if history.comparison is not None:
        verdicts = list(history.comparison["verdicts"].values())
        found += [(verdict, f"{verdicts.count(verdict)} of {len(verdicts)}") for verdict in VERDICTS]
    if history.rounds:
        last = history.rounds[-1]
        found.append(("epochs", f"{last['epoch']} of {last['num_epochs']}"))
    counts = merge_counts(history)
    found.append(("merges", str(counts["merged"])))
    if counts["rejected"]:
        found.append(("taken over, refused by the gate", f"{counts['accepted']}, {counts['rejected']}"))
    found.append(("alerts", str(len(history.alerts))))
    return found


def merge_rules(history: History, participant: str | None = None) -> list[charts.Rule]:
    """A line at every merge; for one participant coloured by whether it took the merged state."""
    rules = []
    for merge in history.merges:
        if merge["status"] == "skipped":
            continue
        text, tone = f"merge after epoch {merge['epoch']}: {merge['method']}", merge["status"]
        if participant is not None and merge["status"] == "merged":
            if participant not in merge["gate"]:
                continue
            tone = "accepted" if took(merge, participant) else "rejected"
            text += f", {tone}"
        rules.append(charts.Rule(x=merge["epoch"], text=text, tone=tone))
    return rules


def _small_multiples(history: History) -> list[dict[str, Any]]:
    """One entry a participant: name, status, its charts; all with the same axes."""
    names = [name for name in history.facts["participants"] if name in history.series]
    metric = main_metric([key for entry in history.evaluations for key in entry["metrics"]])
    losses = {
        name: charts.smoothed(
            list(zip(history.series[name]["epoch"], history.series[name]["loss"], strict=True))
        )
        for name in names
    }
    values = {name: [(x, y) for x, _, y in metric_points(history, name, metric)] for name in names}
    loss_extent, value_extent = _extent(losses), _extent(values)
    entries = []
    for name in names:
        rules = merge_rules(history, name)
        drawn = []
        for title, points, extent in (
            (metric, values[name], value_extent),
            ("training loss", losses[name], loss_extent),
        ):
            if title is None or extent is None:
                continue
            lines = [charts.Line(name=title, colour=0, points=points)]
            if title == metric:
                lines.append(charts.Line(name=title, colour=0, points=points, style="points"))
            svg = charts.line_chart(
                lines, label=f"{name}: {title}", x_name="epoch", rules=rules, is_small=True, extent=extent
            )
            if svg:
                drawn.append({"title": title, "svg": Markup(svg)})
        status, reason = status_of(history, name)
        entries.append({"name": name, "status": status, "reason": reason, "charts": drawn})
    return entries


def _extent(points: Mapping[str, Sequence[charts.Point]]) -> tuple[float, float, float] | None:
    """Last x, lowest and highest y of all participants; None where nothing is finite."""
    finite = [(x, y) for of_one in points.values() for x, y in of_one if abs(y) < float("inf")]
    if not finite:
        return None
    return max(x for x, _ in finite), min(y for _, y in finite), max(y for _, y in finite)


def _merge_row(history: History, merge: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = list(merge["gate"].values())
    changes = _changes(merge)
    return {
        **merge,
        # Its folder and its name: the rest is where the run directory lies.
        "path": merge["path"] and "/".join(Path(merge["path"]).parts[-2:]),
        "sources": names_in_short(merge["participants"]),
        "num_accepted": sum(verdict != "rejected" for verdict in verdicts),
        "num_rejected": sum(verdict == "rejected" for verdict in verdicts),
        "mean_change": f"{sum(changes) / len(changes):+.4f}" if changes else "–",
        "metric": main_metric([key for metrics in merge["after"].values() for key in metrics]),
        "rows": [(name, merge["gate"][name] or "", _before_and_after(merge, name)) for name in merge["gate"]],
    }


def _changes(merge: Mapping[str, Any]) -> list[float]:
    """Change of the main metric of every participant that was offered the merged state."""
    changes = []
    for name in merge["gate"]:
        before, after = merge["before"].get(name, {}), merge["after"].get(name, {})
        metric = main_metric([key for key in after if key in before])
        for key in (metric, f"eval_{metric}"):
            if metric is not None and key in after:
                changes.append(float(after[key]) - float(before[key]))
                break
    return changes


def _before_and_after(merge: Mapping[str, Any], name: str) -> str:
    before, after = merge["before"].get(name, {}), merge["after"].get(name, {})
    return ", ".join(
        f"{key.removeprefix('eval_')} {wording.number(before.get(key))} → {wording.number(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if wording.is_metric(key)
    )


def _weights(history: History) -> list[dict[str, Any]]:
    """A heat map for each stretch of merges with the same weights, the newest first, a few of them."""
    groups: list[dict[str, Any]] = []
    for merge in reversed(history.merges):
        if merge["status"] != "merged" or not merge["weights"]:
            continue
        if groups and groups[-1]["weights"] == merge["weights"]:
            groups[-1]["epochs"].insert(0, merge["epoch"])
        else:
            groups.append(
                {"weights": merge["weights"], "epochs": [merge["epoch"]], "columns": merge["participants"]}
            )
    return [
        {
            "epochs": ", ".join(map(str, group["epochs"])),
            "svg": Markup(
                heat_map(
                    list(group["weights"]), group["columns"], group["weights"], label="weights of the merge"
                )
            ),
        }
        for group in groups[:MAX_HEAT_MAPS]
    ]
