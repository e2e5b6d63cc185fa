"""One tensor of a model with adapters added to it, computed while it is read.

Nothing of the tensor's size is kept: a span takes whole rows of the base, adds the low-rank product for these rows in
float64 and rounds once to float32. Blocks of rows begin at fixed places, so that the bits of an element do not depend
on the span that asked for it.

Legend: W [rows, columns] the base's tensor, S what replaces it, V_k what adapter k makes of it, r the rank.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from toolkit.merging.group import MemoryReader, Reader
from toolkit.merging.lora.adapter import TokenRows
from toolkit.merging.lora.arrays import Array, widened
from toolkit_kernels.rules import Floats
from toolkit_kernels.spans import Span

# Multiplications of one block: so small that BLAS stays in the calling thread, of which there is one a core.
MAX_PRODUCTS = 1 << 18
# Rows of a block where one row alone is more: a product of fewer rows would read the right factor too often.
MIN_ROWS = 8


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """scale * left @ right.

    Attributes:
        left: [rows, r].
        right: [r, columns].
    """

    left: Array
    right: Array
    scale: float

    def transposed(self) -> "LowRank":
        return LowRank(self.right.transposed, self.left.transposed, self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What one adapter does to a tensor, and how much of it is wanted.

    V = S + scale * left @ right, S being W where nothing replaces it; with a magnitude
    V = magnitude * (S + ...) / norm(S + ...), norms and magnitudes being those of the layer's outputs (DoRA); with
    tokens V = S but for their rows.

    Attributes:
        weight: of V - W in the result.
        update: low-rank product.
        replacement: S [rows, columns].
        magnitude: [rows], or [columns] where ``outputs_are_columns``.
        tokens: rows that are replaced.
    """

    weight: float
    update: LowRank | None = None
    replacement: Array | None = None
    magnitude: Array | None = None
    outputs_are_columns: bool = False
    tokens: TokenRows | None = None

    @property
    def only_adds(self) -> bool:
        """Whether V - W does not depend on W."""
        return self.replacement is None and self.magnitude is None and self.tokens is None

    @property
    def only_replaces(self) -> bool:
        return self.update is None and self.magnitude is None and self.tokens is None


@dataclass(frozen=True, slots=True)
class ReplacingReader(MemoryReader):
    """A whole tensor of an adapter, in the place of the base's.

    Attributes:
        result_dtype: as of AdaptedReader.
    """

    result_dtype: str


class AdaptedReader:
    """W + sum_k weight_k (V_k - W), a Reader; without W the mean sum_k weight_k V_k / sum_k weight_k.

    Args:
        base: W; None where no model has it (a new head) or its shape is another one.
        shape: of the result.
        changes: K of them.
        where: for messages.
        result_dtype: that a model with the adapter merged into it would have: that of the base's tensor, of whatever
            shape; None where the base has none.
    """

    dtype = "float32"

    def __init__(
        self,
        base: Reader | None,
        shape: tuple[int, ...],
        changes: Sequence[Change],
        where: str,
        result_dtype: str | None = None,
    ) -> None:
        self.base = base
        self.shape = shape
        self.changes = tuple(changes)
        self.where = where
        self.result_dtype = result_dtype or self.dtype
        self._rows = shape[0] if shape else 1
        self._columns = prod(shape[1:])
        rank = max([1, *(c.update.left.shape[1] for c in changes if c.update is not None)])
        self._step = max(MAX_PRODUCTS // max(self._columns * rank, 1), MIN_ROWS)
        if base is None:
            total = sum(change.weight for change in changes)
            self._base_weight, self._weights = 0.0, [change.weight / total for change in changes]
        else:
            self._base_weight = 1.0 - sum(change.weight for change in changes if not change.only_adds)
            self._weights = [change.weight for change in changes]
        self._norms: dict[int, Floats] = {}
        self._lock = threading.Lock()

    def span(self, start: int, size: int) -> Span:
        out = np.empty(size, np.float32)
        rights = self._rights()
        first = start // max(self._columns, 1)
        for row in range(first - first % self._step, self._rows, self._step):
            place = row * self._columns - start
            if place >= size:
                break
            values = self._block(row, min(row + self._step, self._rows), rights).reshape(-1)
            skipped = max(-place, 0)
            part = values[skipped : size - place]
            out[place + skipped : place + skipped + len(part)] = part
        return Span(out, "float32")

    def _rights(self) -> list[Floats | None]:
        return [None if change.update is None else change.update.right.float64() for change in self.changes]

    def _block(self, row: int, stop: int, rights: Sequence[Floats | None]) -> Floats:
        """Rows ``row`` to ``stop`` of the result."""
        base = self._base_rows(row, stop)
        total = np.zeros((stop - row, self._columns)) if base is None else self._base_weight * base
        for number, (change, weight) in enumerate(zip(self.changes, self._weights, strict=True)):
            if change.only_adds:
                total += _product(change, rights[number], row, stop, weight)
                continue
            values = self._changed(change, base, rights[number], row, stop)
            if change.magnitude is not None:
                values *= self._factors(number, row, stop)
            total += weight * values
        return total

    def _base_rows(self, row: int, stop: int) -> Floats | None:
        if self.base is None:
            return None
        span = self.base.span(row * self._columns, (stop - row) * self._columns)
        return widened(np.asarray(span.data), span.dtype).reshape(stop - row, self._columns)

    def _changed(
        self, change: Change, base: Floats | None, right: Floats | None, row: int, stop: int
    ) -> Floats:
        """V of rows ``row`` to ``stop``, without magnitudes."""
        if change.replacement is not None:
            flat = change.replacement.values.reshape(self._rows, self._columns)
            values = widened(flat[row:stop], change.replacement.dtype)
        else:
            assert base is not None
            values = base.copy()
        if change.update is not None:
            values += _product(change, right, row, stop, 1.0)
        if change.tokens is not None:
            for index, new in zip(change.tokens.indices, change.tokens.rows.values, strict=True):
                if row <= index < stop:
                    values[index - row] = widened(new, change.tokens.rows.dtype)
        return values

    def _factors(self, number: int, row: int, stop: int) -> Floats:
        """DoRA's magnitude / norm of change ``number``, to be multiplied onto rows ``row`` to ``stop``."""
        with self._lock:
            if number not in self._norms:
                self._norms[number] = self._norms_of(number)
        change = self.changes[number]
        assert change.magnitude is not None
        with np.errstate(divide="ignore", invalid="ignore"):  # the engine counts what is not finite
            factors = change.magnitude.float64().reshape(-1) / self._norms[number]
        return factors if change.outputs_are_columns else factors[row:stop, None]

    def _norms_of(self, number: int) -> Floats:
        """Norms of the layer's outputs; one pass over the tensor."""
        change = self.changes[number]
        right = None if change.update is None else change.update.right.float64()
        squares = np.zeros(self._columns if change.outputs_are_columns else self._rows)
        for row in range(0, self._rows, self._step):
            stop = min(row + self._step, self._rows)
            values = self._changed(change, self._base_rows(row, stop), right, row, stop)
            if change.outputs_are_columns:
                squares += np.square(values).sum(axis=0)
            else:
                squares[row:stop] = np.square(values).sum(axis=1)
        return np.sqrt(squares)


def _product(change: Change, right: Floats | None, row: int, stop: int, weight: float) -> Floats:
    assert change.update is not None
    assert right is not None
    return (weight * change.update.scale * change.update.left.rows(row, stop)) @ right
