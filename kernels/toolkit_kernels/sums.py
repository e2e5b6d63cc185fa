"""Passes over a tensor that lies in several pieces: sums of products, and the exact set of largest elements."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels.backend import Backend
from toolkit_kernels.reference import magnitude_bits, read
from toolkit_kernels.rules import NOTHING, Floats, Inputs, Threshold

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
# Below this many elements a partition takes less time than histograms with 98 304 bins.
SMALL = 1 << 15
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

    A radix select over the bit patterns of float32: two histograms, then a look at the elements that equal the smallest
    one of the set; for a small tensor, a partition of its bit patterns. No sort and no sample; exact for any input
    without NaN.
    """
    size = sum(piece.size for piece in pieces)
    wanted = [min(max(int(count), 0), size) for count in counts]
    if len(pieces) < 2 and size < SMALL and all(span.on_cpu for piece in pieces for span in piece.theta):
        return [_largest_of_few(pieces, k, count) for k, count in enumerate(wanted)]
    upper = _added(parallel_map, lambda piece: backend.histogram(piece, None), pieces)
    prefixes, above = _descend(upper, wanted)
    lower = _added(parallel_map, lambda piece: backend.histogram(piece, prefixes), pieces)
    suffixes, within = _descend(lower, [w - a for w, a in zip(wanted, above, strict=True)])
    thresholds = []
    for k, count in enumerate(wanted):
        bits = (prefixes[k] << 16) | suffixes[k]
        rest = (
            count - above[k] - within[k]
        )  # how many of the elements that equal the threshold belong to the set
        if count == 0:
            thresholds.append(NOTHING)
        elif rest == lower[k, suffixes[k]]:
            thresholds.append(Threshold(bits, size))
        else:
            thresholds.append(Threshold(bits, _position(backend, pieces, k, bits, rest)))
    return thresholds


def _largest_of_few(pieces: Sequence[Inputs], model: int, count: int) -> Threshold:
    """The set of a tensor that is one piece, or empty."""
    if count == 0:
        return NOTHING
    (piece,) = pieces
    base = 0.0 if piece.base is None else read(piece.base)
    with np.errstate(all="ignore"):
        bits = magnitude_bits(read(piece.theta[model]) - base)
    smallest = int(np.partition(bits, piece.size - count)[piece.size - count])
    equal = np.flatnonzero(bits == smallest)
    rest = count - np.count_nonzero(bits > smallest)
    return Threshold(smallest, piece.size if rest == len(equal) else piece.start + int(equal[rest - 1]))


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
        positions = backend.equal_positions(piece, model, bits)
        if rest <= len(positions):
            return piece.start + int(positions[rest - 1])
        rest -= len(positions)
    raise AssertionError("histograms and elements disagree")
