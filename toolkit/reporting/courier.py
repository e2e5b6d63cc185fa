"""Records of a rank that is not the main one, on their way to the main one's listeners."""

import dataclasses
from typing import Any

from toolkit.reporting import records
from toolkit.reporting.records import Record


class Courier:
    """Listener that keeps records until they are fetched."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []

    def handle(self, record: Record) -> None:
        self._kept.append({"kind": type(record).__name__, "values": dataclasses.asdict(record)})

    def take(self) -> list[dict[str, Any]]:
        """What was kept, as JSON values (NaN and infinity among them); it is kept no longer."""
        kept, self._kept = self._kept, []
        return kept

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "Courier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpack(kept: dict[str, Any]) -> Record:
    """The record that :meth:`Courier.take` gave."""
    return getattr(records, kept["kind"])(**kept["values"])
