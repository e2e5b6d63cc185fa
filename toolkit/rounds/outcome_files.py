"""What each model of the comparison did on each held-out row: ``<run>/comparison/<arm>/<model>/<rows of>.npz``."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.durable import write_bytes
from toolkit.evaluation.outcomes import RowOutcomes
from toolkit.rounds.comparison import best_source

BASE = "base"
OWN_TRAINING = "own_training"
LAST_MERGE = "last_merge"
BEST_SOURCE = "best_source"
ITERATIVE = "iterative"


class OutcomeFiles:
    """Row outcomes on disk: small, so that a comparison needs no model again.

    Args:
        folder: of the comparison, in the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, arm: str, model: str, outcomes: RowOutcomes, *, rows_of: str | None = None) -> None:
        """Replace the outcomes of the model of ``model`` in ``arm`` on the held-out rows of ``rows_of`` (its own)."""
        arrays = {"loss": outcomes.loss, "weight": outcomes.weight}
        if outcomes.expected is not None and outcomes.predicted is not None:
            arrays |= {"expected": outcomes.expected, "predicted": outcomes.predicted}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_bytes(self._path(arm, model, rows_of), content.getvalue())

    def read(self, arm: str, model: str, *, rows_of: str | None = None) -> RowOutcomes | None:
        """None where nothing was written."""
        path = self._path(arm, model, rows_of)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return RowOutcomes(**{name: arrays[name] for name in arrays.files})

    def _path(self, arm: str, model: str, rows_of: str | None) -> Path:
        return self._folder / arm / model / f"{rows_of or model}.npz"


def arms_of(
    files: OutcomeFiles, locales: Sequence[str], metric: Any
) -> tuple[dict[str, dict[str, list[RowOutcomes]]], dict[str, str]]:
    """What :func:`toolkit.rounds.comparison.compare` takes, for one seed.

    Returns:
        Outcomes by locale and arm; and by locale, which other one's own training is best on its rows.
    """
    measured: dict[str, dict[str, list[RowOutcomes]]] = {}
    sources: dict[str, str] = {}
    for locale in locales:
        found = {arm: files.read(arm, locale) for arm in (BASE, OWN_TRAINING, LAST_MERGE, ITERATIVE)}
        others = {o: files.read(OWN_TRAINING, o, rows_of=locale) for o in locales if o != locale}
        present = {other: outcomes for other, outcomes in others.items() if outcomes is not None}
        source = best_source(present, metric)
        if source is not None:
            sources[locale], found[BEST_SOURCE] = source, present[source]
        arms = {arm: [outcomes] for arm, outcomes in found.items() if outcomes is not None}
        if arms:
            measured[locale] = arms
    return measured, sources
