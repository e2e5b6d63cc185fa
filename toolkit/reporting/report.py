"""report.html: a run on one page that needs nothing but a browser, drawn from the history."""

import functools
import importlib.resources
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from toolkit.durable import write_text
from toolkit.reporting import charts, report_charts, report_rounds, wording
from toolkit.reporting.history import History, now_utc
from toolkit.reporting.metrics import summarize
from toolkit.reporting.pace import Pace
from toolkit.reporting.records import (
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    MergeRecord,
    Record,
    RoundRecord,
    RunEnd,
    RunStart,
    StepRecord,
)

logger = logging.getLogger("toolkit.reporting")

DRAWN_AT = (CheckpointRecord, EvaluationRecord, MergeRecord, RoundRecord, ComparisonRecord)
REPORT_NAME = "report.html"
MAX_NUMBERS = 24


class ReportWriter:
    """Listener that draws report.html at evaluations and checkpoints (amortised) and at the end.

    Args:
        run_dir: the run directory; ``environment.json`` in it is shown when it is there.
        history: filled by the listener before this one.
        config: the resolved configuration, JSON values.
    """

    def __init__(self, run_dir: Path, history: History, *, config: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._history = history
        self._config = config
        self._pace = Pace(interval_seconds=10.0, max_share=0.02)
        self._is_due_at_close = False

    def handle(self, record: Record) -> None:
        if isinstance(record, RunStart | StepRecord):
            self._is_due_at_close = True
        elif isinstance(record, RunEnd):
            self._is_due_at_close = False
            self.flush()
        elif isinstance(record, DRAWN_AT) and self._pace.is_due():
            self.flush()

    def flush(self) -> None:
        """Draw and write the page now."""
        with self._pace.measured():
            page = render(self._history, config=self._config, run_dir=self._run_dir)
            write_text(self._run_dir / REPORT_NAME, page)

    def close(self) -> None:
        if self._is_due_at_close:
            self.flush()


def render(history: History, *, config: Mapping[str, Any], run_dir: Path) -> str:
    """The page as HTML text."""
    metrics = summarize(history)
    return (
        _environment()
        .get_template(REPORT_NAME)
        .render(
            facts=history.facts,
            metrics=metrics,
            tiles=[*report_rounds.tiles(history), *_tiles(metrics)],
            rounds=report_rounds.sections(history),
            rows=history.rows,
            end=history.end,
            charts=report_charts.curves(history),
            legend=_legend(history),
            metric_names=_metric_names(metrics),
            evaluations=history.evaluations,
            samples=_samples(history),
            data_check=history.data_check or {},
            config=config,
            machine=_machine(run_dir),
            files=_files(run_dir),
            written=now_utc(),
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters |= {"number": wording.number, "size": wording.size, "duration": wording.duration}
    environment.filters["value"] = _value
    environment.filters["without"] = lambda values, name: {k: v for k, v in values.items() if k != name}
    environment.filters["flat"] = _flat
    environment.tests["metric"] = wording.is_metric
    environment.globals["change"] = _change
    return environment


def _template(name: str) -> str:
    return importlib.resources.files("toolkit.reporting").joinpath(name).read_text(encoding="utf-8")


def _tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures at the top: label and value."""
    tiles: list[tuple[str, str]] = []
    participants = list(metrics["participants"].values())
    if len(participants) == 1:
        only = participants[0]
        text = _change(only["first_train_loss"], only["mean_train_loss_of_last_tenth"])
        tiles.append(("training loss", text))
        for name, value in ((n, v) for n, v in only["evaluation"].items() if wording.is_metric(n)):
            text = _change(value["before"], value["final"])
            tiles.append((f"held-out {name.removeprefix('eval_').replace('_', ' ')}", text))
    tiles.append(("steps", f"{metrics['total_steps']:,}"))
    tiles.append(("tokens", f"{metrics['total_tokens']:,}"))
    median = metrics["tokens_per_second"]["median"]
    if median is not None:
        tiles.append(("tokens a second, median", f"{median:,.0f}"))
    tiles.append(("peak memory", wording.size(metrics["peak_memory_bytes"])))
    tiles.append(("wall time", wording.duration(metrics["wall_seconds"])))
    return tiles


def _legend(history: History) -> list[dict[str, Any]]:
    names = [name for name, _ in report_charts.series_in_order(history)]
    if len(names) < 2:
        return []
    return [
        {
            "name": name,
            "colour": number % charts.NUM_COLOURS,
            "dash": charts.DASHES[number // charts.NUM_COLOURS % 3],
        }
        for number, name in enumerate(names)
    ]


def _samples(history: History) -> list[dict[str, Any]]:
    """Answers paired: one entry a participant and prompt, with those before and after."""
    paired: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in history.samples:
        key = (sample["participant"], sample["prompt"])
        entry = paired.setdefault(key, {**sample, "before": None, "during": None, "after": None})
        entry[sample["phase"]] = sample["answer"]
    return list(paired.values())


def _machine(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _files(run_dir: Path) -> list[tuple[str, str]]:
    """Name and size of what lies in the run directory (a folder without a size)."""
    found = []
    for path in sorted(run_dir.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if not path.name.startswith("."):
            found.append(
                (f"{path.name}/", "") if path.is_dir() else (path.name, wording.size(path.stat().st_size))
            )
    return found


def _metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of all participants' evaluations."""
    names = dict.fromkeys(name for part in metrics["participants"].values() for name in part["evaluation"])
    return [name for name in names if wording.is_metric(name)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows: ``("train / num_rows", "160")``."""
    rows: list[tuple[str, str]] = []
    for key, item in values.items():
        label = f"{prefix}{key}"
        if isinstance(item, list | tuple) and any(isinstance(part, Mapping) for part in item):
            item = {str(number): part for number, part in enumerate(item, 1)}
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{label} / ")
        else:
            rows.append((label, _value(item)))
    return rows


def _change(before: Any, after: Any) -> str:
    """``3.1 → 0.5``, or the one of them that is known."""
    known = [wording.number(value) for value in (before, after) if value is not None]
    return " → ".join(known) or "–"


def _value(value: Any) -> str:
    """A value of a configuration or description as text."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):  # an empty one
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        is_long = len(value) > MAX_NUMBERS and all(isinstance(item, int | float) for item in value)
        shown = [_value(item) for item in (value[:MAX_NUMBERS] if is_long else value)]
        return ", ".join([*shown, "…"] if is_long else shown) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
