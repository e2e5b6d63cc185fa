"""The journal of a run: append-only, durable, one JSON object a line.

A fact counts once its line is in the journal. A line is written and synced whole; a process that is killed in the
middle leaves a torn last line, which is cut off when the journal is opened again.
"""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.durable import sync
from toolkit.errors import CheckpointError

JOURNAL_NAME = "journal.jsonl"

FACTS_OF_THE_DISK = frozenset(
    {
        "created",
        "started",
        "checkpoint",
        "checkpoint_deleted",
        "merged_model_deleted",
        "rewound",
        "interrupted",
        "failed",
    }
)
"""Events that :meth:`Journal.rewind` leaves: they tell of the folder, not of where the training stands."""


class Journal:
    """Reads and extends ``journal.jsonl`` in a run directory.

    Args:
        run_dir: exists.
        writable: False on processes other than the first, where :meth:`append` only remembers: every process knows
            what the journal says, and one writes it.

    Raises:
        CheckpointError: a line before the last is not JSON: the file was changed by something else.
    """

    def __init__(self, run_dir: Path, *, writable: bool = True) -> None:
        self._path = run_dir / JOURNAL_NAME
        self._writable = writable
        self._records = self._read()
        self._exchanged = self.last_number

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Add a record and return it after it is durable. Values are JSON values; NaN is refused."""
        record = {
            "number": self.last_number + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **facts,
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if self._writable:
            self._write(line)
        self._records.append(record)
        return record

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        """All records, or those of one event, oldest first."""
        return [r for r in self._records if event is None or r["event"] == event]

    def rewind(self, number: int) -> None:
        """Take back what was recorded after record ``number``: the run goes on from there and records it again.

        The lines stay in the file, before a line that says so; :meth:`records` leaves them out.
        """
        if any(r["number"] > number and r["event"] not in FACTS_OF_THE_DISK for r in self._records):
            self.append(
                "rewound", to=number
            )  # also where it is only remembered: what follows gets new numbers
            self._records = [
                r for r in self._records if r["number"] <= number or r["event"] in FACTS_OF_THE_DISK
            ]

    def exchange(self, gather: Callable[[Any], list[Any]]) -> None:
        """Make the journals of all processes equal: what the others remember is written, and all know what is written.

        Args:
            gather: the JSON value of every process, the writing one first. On all processes.
        """
        own = [r for r in self._since(self._exchanged) if r["event"] != "rewound"]
        others = gather([] if self._writable else own)[1:]
        for record in (record for records in others for record in records):
            if self._writable:
                facts = {name: value for name, value in record.items() if name not in ("number", "time")}
                self.append(**facts)
        written = gather(self._since(self._exchanged) if self._writable else None)[0]
        if not self._writable:
            known = [r for r in self._records if r["number"] <= self._exchanged]
            self._records = _without_rewound([*known, *written])
        self._exchanged = self.last_number

    def _since(self, number: int) -> list[dict[str, Any]]:
        return [r for r in self._records if r["number"] > number]

    @property
    def last_number(self) -> int:
        return self._records[-1]["number"] if self._records else 0

    def _write(self, line: str) -> None:
        is_new = not self._path.exists()
        with open(self._path, "ab") as stream:
            size = stream.tell()
            try:
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:  # a full disk: a part of a line must not come to stand before another
                os.truncate(self._path, size)
                raise
        if is_new:
            sync(self._path.parent)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content) and self._writable:
            with open(self._path, "r+b") as stream:
                stream.truncate(len(whole))
                os.fsync(stream.fileno())
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{self._path}:{number} is damaged: {error}") from error
        return _without_rewound(records)


def _without_rewound(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["event"] == "rewound":
            last = record["to"]
            kept = [r for r in kept if r["number"] <= last or r["event"] in FACTS_OF_THE_DISK]
        kept.append(record)
    return kept
