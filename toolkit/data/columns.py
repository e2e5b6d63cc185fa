"""Prepared rows as ``datasets.Dataset``, without going through Python lists."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.data.classify import Classified
from toolkit.data.encode import Encoded
from toolkit.data.packing import pack

IGNORED = -100
"""The label of a token that is not trained, for torch's cross entropy."""
ROWS_A_CHUNK = 10_000


def language_model_dataset(rows: Sequence[Encoded], *, pack_length: int | None, has_positions: bool) -> Any:
    """Rows of a language model.

    Args:
        rows: encoded rows.
        pack_length: pack into sequences of at most this many tokens; None keeps one row a sequence.
        has_positions: add the columns of packed rows even where a sequence is one row (held-out rows beside
            packed ones).

    Returns:
        a ``datasets.Dataset`` with input_ids, labels (int32 [T], -100 where not trained) and length; packed
        also position_ids (int32 [T], from 0 in each row) and seq_lengths (int32, the length of each row in
        the sequence).
    """
    groups = (
        [[n] for n in range(len(rows))] if pack_length is None else pack([len(r) for r in rows], pack_length)
    )

    def labels(row: Encoded) -> np.ndarray:
        return np.where(row.trained, row.ids, np.int32(IGNORED)).astype(np.int32)

    columns = {
        "input_ids": (np.concatenate([rows[n].ids for n in group]) for group in groups),
        "labels": (np.concatenate([labels(rows[n]) for n in group]) for group in groups),
    }
    if pack_length is not None or has_positions:
        columns["position_ids"] = (
            np.concatenate([np.arange(len(rows[n]), dtype=np.int32) for n in group]) for group in groups
        )
        columns["seq_lengths"] = (
            np.asarray([len(rows[n]) for n in group], dtype=np.int32) for group in groups
        )
    return _dataset(columns, {"length": [sum(len(rows[n]) for n in group) for group in groups]})


def classification_dataset(rows: Sequence[Classified]) -> Any:
    """A ``datasets.Dataset`` with input_ids (int32 [T]), labels (int32) and length."""
    return _dataset(
        {"input_ids": (row.ids for row in rows)},
        {"labels": [row.label for row in rows], "length": [len(row) for row in rows]},
    )


def _dataset(lists: Mapping[str, Iterable[np.ndarray]], numbers: Mapping[str, list[int]]) -> Any:
    import datasets
    import pyarrow

    def list_column(values: Iterable[np.ndarray]) -> Any:
        chunks, chunk = [], []
        for value in values:
            chunk.append(value)
            if len(chunk) == ROWS_A_CHUNK:
                chunks.append(_list_array(chunk))
                chunk = []
        if chunk:
            chunks.append(_list_array(chunk))
        return pyarrow.chunked_array(chunks, type=pyarrow.list_(pyarrow.int32()))

    table = {name: list_column(values) for name, values in lists.items()}
    table |= {name: pyarrow.chunked_array([pyarrow.array(v, pyarrow.int32())]) for name, v in numbers.items()}
    return datasets.Dataset(pyarrow.table(table))


def _list_array(rows: Sequence[np.ndarray]) -> Any:
    import pyarrow

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if len(rows) else np.zeros(0, np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat.astype(np.int32)))
