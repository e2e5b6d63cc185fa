"""Passes over a tensor that lies in several pieces: sums of products, and the exact set of largest elements."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels.backend import Backend
from toolkit_kernels.reference import magnitude_bits, read
from toolkit_kernels.rules import NOTHING, Floats, Inputs, Threshold
from toolkit_kernels.spans import Span

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
# Below this many elements a partition takes less time than histograms with 98 304 bins.
SMALL = 1 << 15
# Elements of a line, of which a sample consists (a cache line of bfloat16), and of a sample of a large tensor.
LINE, MIN_SAMPLE = 32, 1 << 14
# Bit patterns of one model that are held at most.
MAX_COLLECTED = 1 << 22
LARGEST_BITS = 0x7FFFFFFF
# Like map(); pool.Pool.map computes the results in parallel, in the order of the items.
Map = Callable[[Callable[[Inputs], ResultT], Sequence[Inputs]], Iterable[ResultT]]


def tree_sum(terms: Sequence[Floats]) -> Floats:
    """Add neighbours, again and again, filled up with zeros to a power of two: the same for any number of threads."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=False)]
        terms = [*pairs, *terms[2 * len(pairs) :]]  # an odd one is added to a zero that is not there
    return terms[0]


def gram(backend: Backend, pieces: Sequence[Inputs], parallel_map: Map = map) -> Floats:
    """[K, K] products <theta_i, theta_j> (of deltas where there is a base) over a whole tensor.

    Args:
        backend: does the sums.
        pieces: the tensor in order; all but the last hold the same power of two of elements, at least BLOCK.
        parallel_map: how to go through the pieces.
    """
    return tree_sum(list(parallel_map(backend.gram, pieces)))


def largest(
    backend: Backend, pieces: Sequence[Inputs], counts: Sequence[int], parallel_map: Map = map
) -> list[Threshold]:
    """The sets of the ``counts[k]`` elements of largest magnitude of each delta_k; of equal ones the first.

    A small tensor's bit patterns are partitioned. Of a large one a few lines say between which bounds the smallest
    element of the set may lie; one pass over all elements counts those above the bounds and collects those between
    them, so that what it finds is exact. Where that element lies elsewhere, a radix select over the bit patterns finds
    it: two histograms. No sort; exact for any input without NaN.
    """
    size = sum(piece.size for piece in pieces)
    wanted = [min(max(int(count), 0), size) for count in counts]
    on_cpu = all(span.on_cpu for piece in pieces for span in piece.theta)
    if len(pieces) < 2 and size < SMALL and on_cpu:
        return [_largest_of_few(pieces, k, count) for k, count in enumerate(wanted)]
    models = [k for k, count in enumerate(wanted) if count]
    found = _between_bounds(backend, pieces, wanted, models, parallel_map) if on_cpu else {}
    if missed := [k for k in models if k not in found]:
        found |= _by_histograms(backend, pieces, wanted, missed, parallel_map)
    thresholds = [NOTHING] * len(wanted)
    for k, smallest in found.items():
        is_split = smallest.rest < smallest.equal
        last = _position(backend, pieces, k, smallest.bits, smallest.rest) if is_split else size
        thresholds[k] = Threshold(smallest.bits, last)
    return thresholds


@dataclass(frozen=True, slots=True)
class _Smallest:
    """The smallest magnitude of a set of largest.

    Attributes:
        bits: its pattern.
        rest: how many of the elements that equal it belong to the set.
        equal: how many there are.
    """

    bits: int
    rest: int
    equal: int


def _between_bounds(
    backend: Backend,
    pieces: Sequence[Inputs],
    wanted: Sequence[int],
    models: Sequence[int],
    parallel_map: Map,
) -> dict[int, _Smallest]:
    """The smallest elements of those ``models`` for which guessed bounds hold it."""
    bounds = _guess(backend, pieces, [wanted[k] for k in models], models)
    if not bounds:
        return {}
    room = MAX_COLLECTED // len(pieces)
    sifted = list(
        parallel_map(
            lambda piece: backend.sift(_chosen(piece, models), bounds, min(room, piece.size // 4 + 1)), pieces
        )
    )
    total = np.sum([counts for counts, _ in sifted], axis=0)
    found = {}
    for row, k in enumerate(models):
        between = np.concatenate([patterns[row] for _, patterns in sifted])
        if smallest := _smallest_of(total[row].tolist(), bounds[row], between, wanted[k]):
            found[k] = smallest
    return found


def _smallest_of(
    counts: Sequence[int], bounds: tuple[int, int], between: NDArray[np.uint32], wanted: int
) -> _Smallest | None:
    """By Backend.sift's numbers of a whole tensor."""
    above_high, from_high, above_low, from_low = counts
    low, high = bounds
    if above_high < wanted <= from_high:
        return _Smallest(high, wanted - above_high, from_high - above_high)
    if above_low < wanted <= from_low:
        return _Smallest(low, wanted - above_low, from_low - above_low)
    if from_high < wanted <= above_low and len(between) == above_low - from_high:
        return _smallest_among(between, wanted - from_high)
    return None


def _smallest_among(patterns: NDArray[np.uint32], wanted: int) -> _Smallest:
    ascending = np.sort(patterns)  # by vectors; a partition takes longer
    bits = int(ascending[len(ascending) - wanted])
    first, behind = np.searchsorted(ascending, np.array([bits, bits + 1], ascending.dtype)).tolist()
    return _Smallest(bits, wanted - (len(ascending) - behind), behind - first)


def _guess(
    backend: Backend, pieces: Sequence[Inputs], wanted: Sequence[int], models: Sequence[int]
) -> list[tuple[int, int]]:
    """For each of the models bounds around the ``wanted``-th largest magnitude, by some lines of elements; [] if few.

    Six standard deviations of a random sample to each side; elements of a line resemble each other, so that bounds may
    miss.
    """
    size = sum(piece.size for piece in pieces)
    num_lines = max(min(MIN_SAMPLE, size // 8), size // 512) // LINE
    stride = int(0.96 * size / max(num_lines, 1)) | 1  # no multiple of a row: lines begin in all columns
    samples = [_thinned(_chosen(piece, models), stride) for piece in pieces if piece.size >= stride]
    sampled = sum(sample.size for sample in samples)
    if sampled < MIN_SAMPLE // 16:
        return []
    everything = [(0, LARGEST_BITS)] * len(models)
    sifted = [backend.sift(sample, everything, sample.size) for sample in samples]
    bounds = []
    for row, count in enumerate(wanted):
        patterns = np.zeros(sampled, np.uint32)  # all but zeros are above the lower bound
        above_zero = np.concatenate([found[row] for _, found in sifted])
        patterns[: len(above_zero)] = above_zero
        patterns.sort()
        share = count / size
        spread = 6 * math.sqrt(sampled * share * (1 - share)) + 8
        upper, lower = sampled * (1 - share) + spread, sampled * (1 - share) - spread
        places = [min(max(int(place), 0), sampled - 1) for place in (lower, upper)]
        low, high = patterns[places].tolist()
        low, high = low if lower > 0 else 0, high if upper < sampled else LARGEST_BITS
        bounds.append((low, high) if low < high else (max(high - 1, 0), max(high, 1)))
    return bounds


def _chosen(piece: Inputs, models: Sequence[int]) -> Inputs:
    return Inputs(tuple(piece.theta[k] for k in models), piece.base, start=piece.start)


def _thinned(piece: Inputs, stride: int) -> Inputs:
    """LINE of ``stride`` elements, again and again."""
    num_lines = piece.size // stride

    def lines(span: Span) -> Span:
        return Span(
            span.data[: num_lines * stride].reshape(num_lines, stride)[:, :LINE].reshape(-1), span.dtype
        )

    return Inputs(tuple(map(lines, piece.theta)), None if piece.base is None else lines(piece.base))


def _by_histograms(
    backend: Backend,
    pieces: Sequence[Inputs],
    wanted: Sequence[int],
    models: Sequence[int],
    parallel_map: Map,
) -> dict[int, _Smallest]:
    """The smallest elements by a radix select."""
    chosen = [_chosen(piece, models) for piece in pieces]
    counts = [wanted[k] for k in models]
    upper = _added(parallel_map, lambda piece: backend.histogram(piece, None), chosen)
    prefixes, above = _descend(upper, counts)
    lower = _added(parallel_map, lambda piece: backend.histogram(piece, prefixes), chosen)
    within = [count - a for count, a in zip(counts, above, strict=True)]
    suffixes, larger = _descend(lower, within)
    return {
        k: _Smallest(
            (prefixes[row] << 16) | suffixes[row],
            within[row] - larger[row],
            int(lower[row, suffixes[row]]),
        )
        for row, k in enumerate(models)
    }


def _largest_of_few(pieces: Sequence[Inputs], model: int, count: int) -> Threshold:
    """The set of a tensor that is one piece, or empty."""
    if count == 0:
        return NOTHING
    (piece,) = pieces
    base = 0.0 if piece.base is None else read(piece.base)
    with np.errstate(all="ignore"):
        patterns = magnitude_bits(read(piece.theta[model]) - base)
    smallest = _smallest_among(patterns, count)
    if smallest.rest == smallest.equal:
        return Threshold(smallest.bits, piece.size)
    places = np.flatnonzero(patterns == smallest.bits)
    return Threshold(smallest.bits, piece.start + int(places[smallest.rest - 1]))


def _added(
    parallel_map: Map, histogram: Callable[[Inputs], NDArray[np.int64]], pieces: Sequence[Inputs]
) -> NDArray[np.int64]:
    """The sum of the histograms of all pieces, each added as soon as it is there."""
    total: list[NDArray[np.int64]] = []
    lock = threading.Lock()

    def add(piece: Inputs) -> None:
        counts = histogram(piece)
        with lock:
            if total:
                total[0] += counts
            else:
                total.append(counts)

    for _ in parallel_map(add, pieces):
        pass
    return total[0]


def _descend(histogram: np.ndarray, counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each row: the bin that holds the ``count``-th largest element, and how many lie in the bins above it."""
    bins, above = [], []
    for row, count in zip(histogram, counts, strict=True):
        from_above = np.cumsum(row[::-1])
        place = int(np.searchsorted(from_above, max(count, 1)))
        bins.append(len(row) - 1 - place)
        above.append(int(from_above[place] - row[bins[-1]]))
    return bins, above


def _position(backend: Backend, pieces: Sequence[Inputs], model: int, bits: int, rest: int) -> int:
    """Index, in the tensor, of the ``rest``-th element (from 1) of model ``model`` that has these bits."""
    for piece in pieces:
        many, place = backend.nth_equal(piece, model, bits, rest)
        if many == rest:
            return piece.start + place
        rest -= many
    raise AssertionError("histograms and elements disagree")
