"""Rows of one file: JSON, JSON lines, CSV or Parquet, with errors that say where."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import DataError

EVALUATION_SPLITS = ("validation", "valid", "eval", "dev", "test")
SPLIT_NAMES = ("train", *EVALUATION_SPLITS)
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of one split of one source.

    Args:
        source: path or hub id, for messages.
        rows: one mapping a row.
        columns: every column that a row has, in order of appearance.
        places: line or row number of each row in the source, from 1.
        unit: "line" or "row": what ``places`` counts.
        notes: what the user should know about where the rows are from.
    """

    source: str
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    places: Sequence[int]
    unit: str = "row"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        place = self.places[index]
        return f"{self.source}:{place}" if self.unit == "line" else f"{self.source}: row {place}"

    def select(self, indices: Sequence[int]) -> "Table":
        return Table(
            self.source,
            [self.rows[i] for i in indices],
            self.columns,
            [self.places[i] for i in indices],
            self.unit,
            self.notes,
        )


def make_table(source: str, rows: Sequence[Row], places: Sequence[int], unit: str) -> Table:
    """Return the table of ``rows``, whose columns are all that a row has.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError(f"{source} is empty: it has no rows")
    return Table(source, rows, tuple(dict.fromkeys(name for row in rows for name in row)), places, unit)


def require_one_kind(table: Table, columns: Collection[str]) -> None:
    """Check that each of ``columns`` holds one kind of value; what nobody reads may be mixed.

    Raises:
        DataError: a column holds two kinds of value; the message names the first row of each.
    """
    kinds: dict[str, tuple[str, int]] = {}
    for index, row in enumerate(table.rows):
        for name in columns:
            kind = _kind(row.get(name))
            if name not in kinds or kinds[name][0] == "null":
                kinds[name] = (kind, index)
            elif kind not in ("null", kinds[name][0]):
                first_kind, first = kinds[name]
                raise DataError(
                    f"{table.where(index)}: column {name!r} holds {kind} here and {first_kind} in "
                    f"{table.where(first)}",
                    hint="give every row of a column the same kind of value",
                )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for types, name in (
        (str, "a text"),
        ((int, float), "a number"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__


def read_file(path: Path) -> dict[str, Table]:
    """Return the tables of one file by split; "" where the file names no split.

    Raises:
        DataError: unknown ending, empty, wrong encoding, broken JSON or CSV.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: cannot read files that end in {suffix or '(nothing)'}",
            hint=f"use {', '.join(SUFFIXES)}",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if suffix == ".parquet":
        return {"": _read_parquet(path)}
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    if suffix in (".csv", ".tsv"):
        return {"": _read_csv(path, text, "\t" if suffix == ".tsv" else ",")}
    if suffix == ".json":
        return _read_json(path, text)
    return {"": _read_json_lines(path, text)}


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path} is in UTF-16; UTF-8 is needed", hint=f"iconv -f UTF-16 -t UTF-8 {path.name} > new-file"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: the byte 0x{raw[error.start]:02x} is not UTF-8",
            hint=f"save the file as UTF-8, e.g. iconv -f ISO-8859-1 -t UTF-8 {path.name} > new-file",
        ) from error


def _read_json_lines(path: Path, text: str) -> Table:
    rows: list[Row] = []
    places: list[int] = []
    # Not str.splitlines: it also splits at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            column = getattr(error, "colno", 1)
            raise DataError(
                f"{path}:{number}: broken JSON at column {column} ({getattr(error, 'msg', error)}): "
                f"{excerpt(line, column)}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: a JSON object is needed on each line, not {_kind(row)}: {excerpt(line, 1)}"
            )
        rows.append(row)
        places.append(number)
    return make_table(str(path), rows, places, "line")


def excerpt(line: str, column: int, *, num_characters: int = 60) -> str:
    """The part of ``line`` around ``column`` (from 1), on one line."""
    start = max(0, min(column - 1, len(line)) - num_characters // 2)
    part = line[start : start + num_characters].strip()
    return f"{'...' if start else ''}{part}{'...' if start + num_characters < len(line) else ''}"


def _read_json(path: Path, text: str) -> dict[str, Table]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return {"": _read_json_lines(path, text)}
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}): "
            f"{excerpt(line, error.colno)}"
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if _is_splits(value):
        return {split: _json_table(f"{path} [{split}]", rows) for split, rows in value.items()}
    if not isinstance(value, list):
        raise DataError(
            f'{path}: a JSON array of rows is needed, or {{"data": [...]}}; this is {_kind(value)}',
            hint="put a single row in brackets: [{...}]; one object a line is JSON lines: name the file .jsonl",
        )
    return {"": _json_table(str(path), value)}


def _is_splits(value: Any) -> bool:
    """{"train": [rows], "validation": [rows]}; one row with a list of messages looks the same but for the
    names."""
    if not isinstance(value, dict) or not set(SPLIT_NAMES) & set(value):
        return False
    if not all(isinstance(rows, list) for rows in value.values()):
        return False
    return all(isinstance(row, dict) for rows in value.values() for row in rows)


def _json_table(source: str, rows: list[Any]) -> Table:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{source}: row {number} is {_kind(row)}; an object is needed: {excerpt(json.dumps(row), 1)}"
            )
    return make_table(source, rows, range(1, len(rows) + 1), "row")


def _read_csv(path: Path, text: str, delimiter: str) -> Table:
    # A text field may be longer than the 128 kB that the module allows at first.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    places: list[int] = []
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            raise DataError(f"{path}:1: a column name appears twice: {', '.join(header)}")
        line = reader.line_num + 1
        for values in reader:
            if values:
                if len(values) != len(header):
                    raise DataError(
                        f"{path}:{line}: {len(values)} fields, and the first line names {len(header)} "
                        "columns: "
                        f"{excerpt(delimiter.join(values), 1)}",
                        hint='put fields that hold a comma or a line break in double quotes ("...")',
                    )
                rows.append(dict(zip(header, values, strict=True)))
                places.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV ({error})") from error
    return make_table(str(path), rows, places, "line")


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error
    return make_table(str(path), rows, range(1, len(rows) + 1), "row")
