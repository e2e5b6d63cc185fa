"""Embeddings whose rows are taken from several tensors, gathered while they are read: no model is rewritten.

Legend: V rows of the result, H elements a row, P parts (tensors that rows come from).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from toolkit.merging.group import Reader
from toolkit_kernels.spans import CARRIERS, Span

Integers = NDArray[np.int64]
# Rows that are read at once for a mean over all of them.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of a tensor: a Reader."""

    whole: Reader
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.whole.shape[1:])

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def where(self) -> str:
        return self.whole.where

    def span(self, start: int, size: int) -> Span:
        return self.whole.span(start, size)


@dataclass(frozen=True, slots=True)
class Zeros:
    """Rows of zeros: a Reader."""

    shape: tuple[int, ...]
    dtype: str
    where: str = "zeros"

    def span(self, start: int, size: int) -> Span:
        return Span(np.zeros(size, CARRIERS[self.dtype]), self.dtype)


@dataclass(frozen=True, slots=True)
class MeanRows:
    """Rows that are each the mean of one row of several tensors: a Reader of float32 (float64 where one of them is).

    Attributes:
        parts: P tensors.
        rows_VP: the row of each part; -1 for a part that has no such row. At least one part of each row has.
    """

    parts: tuple[Reader, ...]
    rows_VP: Integers
    where: str = "means of rows"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows_VP), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return wide_dtype([part.dtype for part in self.parts])

    def span(self, start: int, size: int) -> Span:
        length = row_length(self)
        first, last = start // length, (start + size - 1) // length
        rows = np.concatenate([self._row(row) for row in range(first, last + 1)])
        offset = start - first * length
        return Span(rows[offset : offset + size], self.dtype)

    def _row(self, row: int) -> NDArray[np.floating]:
        length = row_length(self)
        own = [
            widened(part.span(int(place) * length, length), "float64")
            for part, place in zip(self.parts, self.rows_VP[row], strict=True)
            if place >= 0
        ]
        return (np.sum(own, axis=0) / len(own)).astype(CARRIERS[self.dtype])


@dataclass(frozen=True)
class MeanOfAllRows:
    """One row, the mean of all rows of a tensor, computed when it is first needed: a Reader."""

    whole: Reader
    where: str = "mean of all rows"
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: list[NDArray[np.floating]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.whole.shape[1:])

    @property
    def dtype(self) -> str:
        return wide_dtype([self.whole.dtype])

    def span(self, start: int, size: int) -> Span:
        with self._lock:
            if not self._known:
                self._known.append(self._mean())
        return Span(self._known[0][start : start + size], self.dtype)

    def _mean(self) -> NDArray[np.floating]:
        length, num_rows = row_length(self.whole), self.whole.shape[0]
        total = np.zeros(length)
        for first in range(0, num_rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_rows - first)
            rows = widened(self.whole.span(first * length, count * length), "float64")
            total += rows.reshape(count, length).sum(axis=0)
        return (total / num_rows).astype(CARRIERS[self.dtype])


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """Rows of several tensors in a new order: a Reader.

    Attributes:
        parts: P tensors.
        starts_R: first row of the result of each run of rows that follow each other in one part; at the end V.
        part_R: the part of each run.
        row_R: the run's first row in its part.
        dtype: that of all parts, else the one that holds the values of each.
    """

    parts: tuple[Reader, ...]
    starts_R: Integers
    part_R: Integers
    row_R: Integers
    dtype: str
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.starts_R[-1]), *self.parts[0].shape[1:])

    def span(self, start: int, size: int) -> Span:
        length = row_length(self)
        run = int(np.searchsorted(self.starts_R, start // length, side="right")) - 1
        out, filled = None, 0
        while filled < size:
            place = start + filled
            count = min(size - filled, int(self.starts_R[run + 1]) * length - place)
            inside = place - int(self.starts_R[run]) * length
            part = self.parts[int(self.part_R[run])]
            piece = part.span(int(self.row_R[run]) * length + inside, count)
            if count == size and part.dtype == self.dtype:
                return piece
            if out is None:
                out = np.empty(size, CARRIERS[self.dtype])
            out[filled : filled + count] = widened(piece, self.dtype)
            filled += count
            run += 1
        return Span(np.empty(0, CARRIERS[self.dtype]) if out is None else out, self.dtype)


def gathered(parts: Sequence[Reader], part_V: Integers, row_V: Integers) -> Reader:
    """A Reader of V rows: row ``row_V[v]`` of ``parts[part_V[v]]``. A part that is taken as it is, is returned."""
    breaks = np.flatnonzero((np.diff(part_V) != 0) | (np.diff(row_V) != 1)) + 1
    firsts = np.concatenate([np.zeros(min(1, len(part_V)), np.int64), breaks])
    used = sorted(set(part_V.tolist()))
    if len(firsts) == 1 and row_V[0] == 0:
        part = parts[used[0]]
        return part if part.shape[0] == len(row_V) else FirstRows(part, len(row_V))
    own = tuple(parts[index] for index in used)
    dtypes = [part.dtype for part in own]
    return GatheredRows(
        parts=own,
        starts_R=np.append(firsts, len(part_V)),
        part_R=np.searchsorted(used, part_V[firsts]),
        row_R=row_V[firsts],
        dtype=dtypes[0] if len(set(dtypes)) == 1 else wide_dtype(dtypes),
        where=", ".join(dict.fromkeys(part.where for part in own)),
    )


def row_length(reader: Reader) -> int:
    """Elements of a row."""
    return prod(reader.shape[1:])


def wide_dtype(dtypes: Sequence[str]) -> str:
    return "float64" if "float64" in dtypes else "float32"


def widened(span: Span, dtype: str) -> NDArray[np.generic]:
    """The values of a span in ``dtype``, which is the span's own or float32 or float64, as numpy carries it."""
    values = span.data
    if not isinstance(values, np.ndarray):  # of torch
        import torch

        wide = values.detach().cpu()
        values = (wide.view(torch.int16) if span.dtype == "bfloat16" else wide).numpy()
        values = values.view(CARRIERS[span.dtype])
    if span.dtype == dtype:
        return values
    if span.dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(CARRIERS[dtype], copy=False)
