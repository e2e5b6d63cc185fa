"""Which format a table has, and its rows as examples."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config.names import did_you_mean
from toolkit.data.examples import Example
from toolkit.data.files import require_one_kind
from toolkit.data.formats import FORMATS, DataFormat, RowError
from toolkit.data.read import Table
from toolkit.errors import DataError

NUM_BAD_ROWS_SHOWN = 3


@dataclass(frozen=True)
class Layout:
    """A format and the column of the file that holds each of its fields."""

    format: DataFormat
    columns: Mapping[str, str]

    def example(self, row: Mapping[str, Any]) -> Example:
        return self.format.build({field: row.get(column) for field, column in self.columns.items()})


def recognise(table: Table, *, data_format: str, data_mapping: Mapping[str, str], task: str) -> Layout:
    """Return the layout of ``table``.

    Args:
        table: the rows.
        data_format: a format's name, or "auto".
        data_mapping: field -> column, for columns under other names.
        task: "causal-lm" or "sequence-classification"; only formats that this task can use are considered.

    Raises:
        DataError: unknown format, a mapped column that is not there, or no format fits.
    """
    if data_format != "auto" and data_format not in FORMATS:
        raise DataError(
            f"unknown data format {data_format!r}{did_you_mean(data_format, FORMATS)}",
            hint=f"known formats: {', '.join(FORMATS)}, auto",
        )
    for field, column in data_mapping.items():
        if column not in table.columns:
            meant = did_you_mean(column, table.columns)
            raise DataError(
                f"{table.source}: --data-mapping {field}={column} names a column that is not there{meant}",
                hint=f"columns: {', '.join(table.columns)}",
            )
    candidates = [FORMATS[data_format]] if data_format != "auto" else _usable(task)
    known_fields = {field for entry in candidates for field in (*entry.needs, *entry.takes)}
    unknown = sorted(set(data_mapping) - known_fields)
    if unknown:
        raise DataError(
            f"--data-mapping names a field that no format has: {', '.join(unknown)}",
            hint=f"fields: {', '.join(sorted(known_fields))}",
        )
    for entry in candidates:
        columns = _columns(entry, table.columns, data_mapping)
        if _fits(entry, table.columns, data_mapping):
            if entry.gives == "labelled" and task != "sequence-classification":
                raise DataError(
                    f"{table.source}: the format {entry.name} has labels and the task is {task}",
                    hint="use --task sequence-classification, or --data-format text to train on the text "
                    "alone",
                )
            return Layout(entry, columns)
    raise DataError(_no_fit(table, candidates, data_mapping), hint=_hint(table, candidates))


def unused_label(table: Table, layout: Layout) -> str | None:
    """The label column of rows that have a text to classify and are read as something else, or None."""
    if layout.format.gives == "labelled":
        return None
    for entry in FORMATS.values():
        if entry.gives == "labelled" and _fits(entry, table.columns, layout.columns):
            return _columns(entry, table.columns, layout.columns)[entry.needs[-1]]
    return None


def guess_task(table: Table, config: Any) -> str:
    """The task that fits the columns.

    Args:
        table: the rows.
        config: has data_format and data_mapping.
    """
    if config.data_format in FORMATS:
        labelled = FORMATS[config.data_format].gives == "labelled"
    else:
        found = [f for f in FORMATS.values() if _fits(f, table.columns, config.data_mapping)]
        labelled = bool(found) and found[0].gives == "labelled"
    return "sequence-classification" if labelled else "causal-lm"


def _fits(entry: DataFormat, present: Sequence[str], mapping: Mapping[str, str]) -> bool:
    columns = _columns(entry, present, mapping)
    return all(field in columns for field in entry.needs)


def _usable(task: str) -> list[DataFormat]:
    wants_labels = task == "sequence-classification"
    usable = [entry for entry in FORMATS.values() if (entry.gives == "labelled") == wants_labels]
    return usable if wants_labels else [*usable, *(f for f in FORMATS.values() if f.gives == "labelled")]


def _columns(entry: DataFormat, present: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    columns = {}
    for field in (*entry.needs, *entry.takes):
        column = mapping.get(field, field)
        if column in present:
            columns[field] = column
    return columns


def _nearest(
    table: Table, candidates: Sequence[DataFormat], mapping: Mapping[str, str]
) -> tuple[DataFormat, list[str]]:
    def missing(entry: DataFormat) -> list[str]:
        found = _columns(entry, table.columns, mapping)
        return [field for field in entry.needs if field not in found]

    def distance(entry: DataFormat) -> tuple[float, float]:
        lacking = missing(entry)
        likeness = sum(
            max((difflib.SequenceMatcher(None, field, c).ratio() for c in table.columns), default=0)
            for field in lacking
        )
        return (len(lacking) / len(entry.needs), -likeness / max(1, len(lacking)))

    nearest = min(candidates, key=distance)
    return nearest, missing(nearest)


def _no_fit(table: Table, candidates: Sequence[DataFormat], mapping: Mapping[str, str]) -> str:
    nearest, lacking = _nearest(table, candidates, mapping)
    asked = f"do not fit the format {nearest.name}" if len(candidates) == 1 else "fit no format"
    lines = [
        f"{table.source}: the columns {asked}",
        f"  columns: {', '.join(table.columns) or '(none)'}",
        f"  a row:   {shorten_row(table.rows[0]) if len(table.rows) else '(no rows)'}",
        f"  nearest: {nearest.name}, which needs {', '.join(nearest.needs)}; missing: {', '.join(lacking)}",
    ]
    return "\n".join(lines)


def _hint(table: Table, candidates: Sequence[DataFormat]) -> str:
    nearest, lacking = _nearest(table, candidates, {})
    spare = [column for column in table.columns if column not in nearest.needs]
    pairs = ",".join(
        f"{field}={spare[n] if n < len(spare) else 'COLUMN'}"
        for n, field in enumerate(lacking or nearest.needs)
    )
    return f"name the columns, e.g. --data-mapping {pairs}; meldkit data formats lists all formats"


def shorten_row(row: Mapping[str, Any], *, num_characters: int = 160) -> str:
    """A row as JSON, its texts and itself cut to a length that fits a terminal."""

    def cut(value: Any) -> Any:
        if isinstance(value, str) and len(value) > 40:
            return value[:37] + "..."
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [cut(v) for v in value[:2]] + (["..."] if len(value) > 2 else [])
        return value

    text = json.dumps(cut(dict(row)), ensure_ascii=False, default=str)
    return text if len(text) <= num_characters else text[: num_characters - 3] + "..."


def build_examples(table: Table, layout: Layout) -> list[Example]:
    """Turn every row into an example.

    Raises:
        DataError: rows that do not keep to the format; the message names the first few with their place.
    """
    require_one_kind(table, layout.columns.values())
    examples: list[Example] = []
    bad: list[str] = []
    num_bad = 0
    for index, row in enumerate(table.rows):
        try:
            examples.append(layout.example(row))
        except RowError as error:
            num_bad += 1
            if len(bad) < NUM_BAD_ROWS_SHOWN:
                bad.append(f"{table.where(index)}: {error}")
    if num_bad:
        more = f"\n  ... and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
        if num_bad == 1:
            raise DataError(f"{bad[0]} (format {layout.format.name})")
        shown = "\n".join(f"  {line}" for line in bad)
        raise DataError(f"{num_bad} rows do not keep to the format {layout.format.name}:\n{shown}{more}")
    return examples
