"""The run's numbers: kept in memory, written as training_history.json and training_metrics.json.

Both files are JSON in the strict sense. Numbers that JSON does not have are strings: ``"NaN"``,
``"Infinity"``, ``"-Infinity"``; ``float()`` reads each of them back.

A resumed run drops what lies beyond the restored step and goes on, so that the history of a run that was
killed and resumed is that of the run that was never killed, apart from times and measurements.
"""

import dataclasses
import json
import math
from array import array
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.errors import RunDirectoryError
from toolkit.reporting.records import (
    AlertRecord,
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    MergeRecord,
    RoundRecord,
    RunEnd,
    SampleRecord,
    StepRecord,
)

HISTORY_NAME = "training_history.json"
METRICS_NAME = "training_metrics.json"
FORMAT_VERSION = 1

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "num_trainable_tokens",
    "total_tokens",
    "total_trainable_tokens",
    "step_seconds",
    "tokens_per_second",
    "memory_bytes",
)
ROUND_LISTS = ("merges", "rounds", "alerts")
GPU_COLUMNS = ("utilization_percent", "power_watts", "memory_used_bytes")


def plain(value: Any) -> Any:
    """``value`` as strict JSON: NaN and infinities as strings, mappings as dict, sequences as list."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def read_back(value: Any) -> Any:
    """``value`` as :func:`plain` was given it, apart from tuples."""
    if isinstance(value, dict):
        return {key: read_back(item) for key, item in value.items()}
    if isinstance(value, list):
        return [read_back(item) for item in value]
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else value


def now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_float(value: float | str | None) -> float:
    """A number as the history file holds it; None (not measured) is NaN."""
    return math.nan if value is None else float(value)


class Series:
    """The recorded steps of one participant, a column of doubles each; what was not measured is NaN."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {name: array("d") for name in (*COLUMNS, *GPU_COLUMNS)}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, column: str) -> "array[float]":
        return self.columns[column]

    def append(self, row: Mapping[str, Any]) -> None:
        for name in COLUMNS:
            self.columns[name].append(as_float(row[name]))
        gpu = row.get("gpu") or {}
        for name in GPU_COLUMNS:
            self.columns[name].append(as_float(gpu.get(name)))


class History:
    """Everything that was recorded of a run so far."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {
            "recipe": "",
            "title": "",
            "status": "running",
            "num_steps": 0,
            "participants": [],
        }
        self.rows: list[tuple[str, str]] = []
        self.data_check: Mapping[str, Any] | None = None
        self.end: RunEnd | None = None
        self.sessions: list[dict[str, Any]] = []
        self.series: dict[str, Series] = {}
        self.evaluations: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.merges: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.comparison: dict[str, Any] | None = None
        # One JSON text a recorded step: made once, so that writing a long history again is only a join.
        self._step_lines: list[str] = []

    def add_step(self, record: StepRecord) -> None:
        row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "num_steps"}
        series = self.series.get(record.participant)
        if series is not None and len(series) and series["step"][-1] >= record.step:
            self._take_back(record.participant, record.step)
        row["step_seconds"] = round(record.step_seconds, 6)
        row["tokens_per_second"] = round(record.tokens_per_second, 2)
        self._append_step(plain(row))

    def add_evaluation(self, record: EvaluationRecord) -> None:
        """Keep an evaluation; one of the same participant, step and phase (after a resume) is replaced."""
        entry = plain(dataclasses.asdict(record))
        entry["train_loss"] = plain(self.train_loss_before(record))
        self._replace(self.evaluations, entry, ("participant", "step", "phase"))

    def add_sample(self, record: SampleRecord) -> None:
        self._replace(self.samples, dataclasses.asdict(record), ("participant", "phase", "prompt"))

    def add_checkpoint(self, record: CheckpointRecord) -> None:
        self._replace(self.checkpoints, dataclasses.asdict(record), ("participant", "step"))

    def add_merge(self, record: MergeRecord) -> None:
        self._replace(self.merges, plain(dataclasses.asdict(record)) | {"time": now_utc()}, ("round",))

    def add_round(self, record: RoundRecord) -> None:
        self._replace(self.rounds, plain(dataclasses.asdict(record)) | {"time": now_utc()}, ("round",))

    def add_alert(self, record: AlertRecord) -> None:
        entry = plain(dataclasses.asdict(record)) | {"time": now_utc()}
        self._replace(self.alerts, entry, ("kind", "participant", "step", "message"))

    def set_comparison(self, record: ComparisonRecord) -> None:
        self.comparison = plain(dataclasses.asdict(record))

    def events(self) -> list[EvaluationRecord | MergeRecord | RoundRecord | AlertRecord]:
        """What happened besides steps, by step: at one step the evaluations, then the merge, the round, the alerts."""
        kinds = (
            (EvaluationRecord, self.evaluations),
            (MergeRecord, self.merges),
            (RoundRecord, self.rounds),
            (AlertRecord, self.alerts),
        )
        found = []
        for order, (kind, entries) in enumerate(kinds):
            names = {field.name for field in dataclasses.fields(kind)}
            for entry in entries:
                step = entry.get("step", max(entry.get("steps", {}).values(), default=0)) or 0
                found.append((step, order, kind(**{n: read_back(v) for n, v in entry.items() if n in names})))
        return [record for _, _, record in sorted(found, key=lambda event: event[:2])]

    @property
    def is_iterative(self) -> bool:
        """Whether participants trained in rounds."""
        return bool(self.rounds or self.merges)

    def train_loss_before(self, record: EvaluationRecord) -> float | None:
        """Mean training loss of the recorded steps since the participant's evaluation before ``record``."""
        earlier = [
            e["step"]
            for e in self.evaluations
            if e["participant"] == record.participant
            and (e["step"], e["phase"]) != (record.step, record.phase)
        ]
        first = max((step for step in earlier if step <= record.step), default=0)
        series = self.series.get(record.participant)
        if series is None:
            return None
        losses = []
        for step, loss in zip(reversed(series["step"]), reversed(series["loss"]), strict=True):
            if step <= first:
                break
            losses.append(loss)
        return sum(losses) / len(losses) if losses else None

    def text(self) -> str:
        """The content of training_history.json: one recorded step a line."""
        facts = plain({"format": FORMAT_VERSION, **self.facts, "sessions": self.sessions})
        head = [f"{json.dumps(name)}: {json.dumps(value, **_JSON)}" for name, value in facts.items()]
        tail = {"evaluations": self.evaluations, "samples": self.samples, "checkpoints": self.checkpoints}
        # Only what a run has: the file of a run without merges is that of a run that knows of none.
        tail |= {name: entries for name in ROUND_LISTS if (entries := getattr(self, name))}
        if self.is_iterative:
            head += [
                f'"{name}": {json.dumps(plain(getattr(self, name)), **_JSON)}'
                for name in ("rows", "data_check")
            ]
        if self.comparison is not None:
            head.append(f'"comparison": {json.dumps(self.comparison, **_JSON)}')
        lists = [
            f'"{name}": [{_lines([json.dumps(e, **_JSON) for e in entries])}]'
            for name, entries in tail.items()
        ]
        steps = f'"steps": [{_lines(self._step_lines)}]'
        return "{\n" + ",\n".join([*head, *lists, steps]) + "\n}\n"

    @classmethod
    def load(cls, path: Path, restored_steps: Mapping[str, int]) -> "History":
        """Read a history back, up to the restored step of each participant (0 for one that is not named).

        Raises:
            RunDirectoryError: the file is damaged, or of a version that this code does not read.
        """
        history = cls()
        if not path.exists():
            return history
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT_VERSION:
                raise ValueError(f"format {content['format']}, not {FORMAT_VERSION}")
            history._restore(content, restored_steps)
        except (ValueError, KeyError, TypeError) as error:
            hint = "move the file away to resume without the history so far"
            raise RunDirectoryError(f"{path}: not a training history ({error})", hint=hint) from error
        return history

    def _restore(self, content: Mapping[str, Any], restored_steps: Mapping[str, int]) -> None:
        def kept(entry: Mapping[str, Any]) -> bool:
            return entry["step"] <= restored_steps.get(entry["participant"], 0)

        self.facts = {name: content[name] for name in self.facts} | {"status": "running"}
        self.sessions = content["sessions"]
        self.evaluations = [entry for entry in content["evaluations"] if kept(entry)]
        self.checkpoints = [entry for entry in content["checkpoints"] if kept(entry)]
        self.samples = content["samples"]
        # A run that is resumed after its last round does not start any more.
        self.rows = [(label, value) for label, value in content.get("rows", [])]
        self.data_check = content.get("data_check")
        self.comparison = content.get("comparison")
        for name in ("merges", "rounds"):
            entries = content.get(name, [])
            setattr(self, name, [e for e in entries if _is_reached(e["steps"], restored_steps)])
        self.alerts = [
            e for e in content.get("alerts", []) if e["participant"] is None or e["step"] is None or kept(e)
        ]
        for row in content["steps"]:
            if kept(row):
                self._append_step(row)

    def _append_step(self, row: Mapping[str, Any]) -> None:
        self.series.setdefault(row["participant"], Series()).append(row)
        self._step_lines.append(json.dumps(row, **_JSON))

    def _take_back(self, participant: str, step: int) -> None:
        """Forget a participant's steps from ``step`` on: it was set back to a checkpoint and makes them again."""
        kept = [
            row
            for row in map(json.loads, self._step_lines)
            if row["participant"] != participant or row["step"] < step
        ]
        self._step_lines, self.series[participant] = [], Series()
        for row in kept:
            self._step_lines.append(json.dumps(row, **_JSON))
            if row["participant"] == participant:
                self.series[participant].append(row)
        self.evaluations = [
            e for e in self.evaluations if e["participant"] != participant or e["step"] < step
        ]

    @staticmethod
    def _replace(entries: list[dict[str, Any]], entry: dict[str, Any], key: tuple[str, ...]) -> None:
        entries[:] = [e for e in entries if any(e[name] != entry[name] for name in key)]
        entries.append(entry)


_JSON: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False}


def _lines(texts: list[str]) -> str:
    return "\n  " + ",\n  ".join(texts) + "\n" if texts else ""


def _is_reached(steps: Mapping[str, int], restored_steps: Mapping[str, int]) -> bool:
    """Whether a merge or round at ``steps`` is not beyond what was restored; a name that was not restored is free."""
    return all(step <= restored_steps.get(name, step) for name, step in steps.items())
