"""Backend for CPUs: loops over strips that stay in the first cache, compiled once to machine code for this processor.

    bits          elements of any dtype in and out of float64
    elementwise   weighted sum, Fisher mean, near swap, sum of squares
    consensus     sparse deltas, elected signs
    philox        the random numbers of the masks
    reductions    sums of products, counts
    magnitudes    histograms, comparisons, places
    objects       compiles, keeps and loads the machine code

Neither torch nor, once the code is in the cache, numba is imported.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels.numba_backend import objects
from toolkit_kernels.rules import (
    NOTHING,
    Consensus,
    FisherMean,
    Floats,
    Inputs,
    Keep,
    NearSwap,
    Piece,
    Pieces,
    Threshold,
    WeightedSum,
)
from toolkit_kernels.spans import Span

_NUM_UPPER, _NUM_LOWER = 1 << 15, 1 << 16
# An eighth of bits.FLOAT64_STRIP and of bits.FLOAT64_BLOCK; importing bits would import numba.
_STRIP_ITEMS, _BLOCK_ITEMS = 512 + 24, 1024 + 24
_MAX_COUNTED = 1 << 31  # elements at a time, so that counts of 32 bits cannot overflow
_MANY = 1 << 16  # elements from which on several lanes of counts are worth their zeroing
_BEYOND = 64 + 4  # magnitudes.GROUP and UNASKED: patterns that are written beyond those found
_ALL, _NO_WORD = Threshold(0, 1 << 62), -1


def make() -> "NumbaBackend":
    objects.check()
    return NumbaBackend()


def _place(span: Span) -> int:
    """Where a span begins; the kernels would end the process at an address of another device."""
    if not span.on_cpu:
        raise ValueError(f"the numba backend computes on the CPU, and a span lies on {span.device}")
    return span.address


def _table(spans: Sequence[Span]) -> NDArray[np.int64]:
    """[2, K]: addresses, dtype codes."""
    return np.array([[_place(span) for span in spans], [span.code for span in spans]], np.int64)


def _base_table(inputs: Inputs) -> NDArray[np.int64]:
    return _table((inputs.base,)) if inputs.base is not None else np.zeros((2, 1), np.int64)


def _numbers(*parts: Sequence[float] | Floats) -> Floats:
    """The parts one behind the other, and three zeros: kernels read up to four weights at a time."""
    return np.concatenate([*parts, (0.0, 0.0, 0.0)]).astype(np.float64, copy=False)


def _mask_row(keep: Keep) -> list[int]:
    """The columns that the module consensus names."""
    among, outside = keep.among or _ALL, keep.outside or NOTHING
    largest_word = 0xFFFFFFFF if keep.probability is None else int(keep.probability * 2.0**32) - 1
    if largest_word == _NO_WORD:
        among, largest_word = NOTHING, 0
    is_masked = keep.among is not None or keep.outside is not None or keep.probability is not None
    is_random = keep.probability is not None
    masks = [is_masked, among.bits, among.last, outside.bits, outside.last]
    return [*masks, is_random, min(largest_word, 0xFFFFFFFF), *keep.key, keep.stream]


class NumbaBackend:
    """See toolkit_kernels.backend.Backend."""

    name = "numba"

    def apply(self, pieces: Pieces) -> NDArray[np.int64]:
        return np.array([self._apply(piece) for piece in pieces], np.int64)

    def _apply(self, piece: Piece) -> int:
        rule, inputs = piece.rule, piece.inputs
        out = (_place(piece.out), piece.out.code, piece.out.size)
        if isinstance(rule, WeightedSum):
            return self._weighted_sum(rule, inputs, out)
        if isinstance(rule, FisherMean):
            spans, fisher = _table(inputs.theta), _table(inputs.fisher)
            numbers = _numbers(rule.weights, rule.floors, rule.fallback)
            compute = objects.load("elementwise", _width("fisher_mean", *inputs.theta, *inputs.fisher), 7)
            return compute(_address(spans), _address(fisher), len(inputs.theta), _address(numbers), *out)
        if isinstance(rule, Consensus):
            return self._consensus(rule, inputs, out)
        return self._near_swap(rule, inputs, out)

    @staticmethod
    def _weighted_sum(rule: WeightedSum, inputs: Inputs, out: tuple[int, int, int]) -> int:
        models, weights = inputs.theta, _numbers(rule.weights)
        if rule.base_weight is not None:
            models, weights = (_base(inputs), *models), _numbers([rule.base_weight], rule.weights)
        spans = _table(models)
        compute = objects.load("elementwise", _width("weighted_sum", *models), 6)
        return compute(_address(spans), len(models), _address(weights), *out)

    @staticmethod
    def _consensus(rule: Consensus, inputs: Inputs, out: tuple[int, int, int]) -> int:
        spans, base = _table(inputs.theta), _table((_base(inputs),))
        numbers = _numbers(rule.weights, [keep.rescale for keep in rule.keep], [rule.scale, rule.negligible])
        masks = np.array([_mask_row(keep) for keep in rule.keep], np.int64)
        work = _room(len(rule.keep) * _STRIP_ITEMS)
        compute = objects.load("consensus", _width("consensus", _base(inputs), *inputs.theta), 12)
        models = (_address(spans), _address(base), len(inputs.theta))
        tables = (*models, _address(numbers), _address(masks), _address(work))
        return compute(*tables, rule.elect, rule.normalize, inputs.start, *out)

    @staticmethod
    def _near_swap(rule: NearSwap, inputs: Inputs, out: tuple[int, int, int]) -> int:
        base, theta = _base(inputs), inputs.theta[0]
        limit = np.array([rule.t], np.float64)
        compute = objects.load("elementwise", "near_swap", 8)
        return compute(_place(base), base.code, _place(theta), theta.code, _address(limit), *out)

    def gram(self, inputs: Inputs) -> Floats:
        spans, base = _table(inputs.theta), _base_table(inputs)
        num_models = len(inputs.theta)
        rows, columns = np.triu_indices(num_models)
        work = _room((num_models + 1) * _BLOCK_ITEMS)
        levels = np.zeros((64, len(rows)))
        compute = objects.load("reductions", "gram", 6)
        compute(_address(spans), _address(base), num_models, _address(work), _address(levels), inputs.size)
        result = np.empty((num_models, num_models))
        result[rows, columns] = result[columns, rows] = levels[0]
        return result

    def histogram(self, inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
        num_models, num_bins = len(inputs.theta), _NUM_UPPER if prefixes is None else _NUM_LOWER
        members = _members(inputs)
        total = np.zeros((num_models, num_bins), np.int64)
        for part in _parts(inputs, _MAX_COUNTED):
            spans, base = _table(part.theta), _base_table(part)
            num_lanes = 4 if part.size >= _MANY else 1
            counts = np.zeros((num_models, num_lanes, num_bins), np.uint32)
            tables = (_address(spans), _address(base), num_models)
            if prefixes is None:
                count = objects.load("magnitudes", _width("histogram_upper", *members), 6)
                count(*tables, _address(counts), num_lanes, part.size)
            else:
                wanted = np.array(prefixes, np.int64)
                count = objects.load("magnitudes", _width("histogram_lower", *members), 7)
                count(*tables, _address(wanted), _address(counts), num_lanes, part.size)
            total += counts.sum(axis=1, dtype=np.int64)
        return total

    def sift(
        self, inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint32]]]:
        num_models, members = len(inputs.theta), _members(inputs)
        spans, base, limits = _table(inputs.theta), _base_table(inputs), np.array(bounds, np.int64)
        counts = np.zeros((num_models, 4), np.int64)
        found = np.empty((num_models, room + _BEYOND), np.uint32)
        compare = objects.load("magnitudes", _width("sift", *members), 8)
        tables = (_address(spans), _address(base), num_models, _address(limits))
        compare(*tables, _address(counts), _address(found), room, inputs.size)
        numbers = counts[:, 2] - counts[:, 1]
        return counts, [row[: min(number, room)].copy() for row, number in zip(found, numbers, strict=True)]

    def nth_equal(self, inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
        spans, base = _table((inputs.theta[model],)), _base_table(inputs)
        position = np.array([-1], np.int64)
        find = objects.load("magnitudes", _width("nth_equal", *_members(inputs)), 6)
        many = find(_address(spans), _address(base), bits, number, _address(position), inputs.size)
        return many, int(position[0])

    def non_finite(self, inputs: Inputs) -> NDArray[np.int64]:
        count = objects.load("reductions", "non_finite", 3)
        return np.array([count(_place(span), span.code, span.size) for span in _members(inputs)], np.int64)

    def add_squares(self, total: Span, values: Span, scale: float = 1.0) -> None:
        factor = np.array([scale], np.float64)
        add = objects.load("elementwise", "add_squares", 5)
        add(_place(total), _place(values), values.code, _address(factor), total.size)


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _room(size: int) -> Floats:
    """Uninitialised float64 that begin with a cache line: vectors of 64 bytes that straddle two take twice as long."""
    room = np.empty(size + 8)
    return room[-_address(room) % 64 // 8 :][:size]


def _width(name: str, *spans: Span) -> str:
    """The variant of a function that takes these dtypes: float64 fits into no lane of float32."""
    return f"{name}_wide" if any(span.dtype == "float64" for span in spans) else name


def _base(inputs: Inputs) -> Span:
    if inputs.base is None:
        raise ValueError("this rule needs a base")
    return inputs.base


def _members(inputs: Inputs) -> tuple[Span, ...]:
    """The models, and the base last if there is one."""
    return inputs.theta if inputs.base is None else (*inputs.theta, inputs.base)


def _parts(inputs: Inputs, size: int) -> list[Inputs]:
    """The inputs cut into parts of at most ``size`` elements."""
    if inputs.size <= size:
        return [inputs]
    parts = []
    for start in range(0, inputs.size, size):
        many = min(size, inputs.size - start)
        theta = tuple(span.part(start, many) for span in inputs.theta)
        base = inputs.base.part(start, many) if inputs.base is not None else None
        parts.append(Inputs(theta, base, start=inputs.start + start))
    return parts
