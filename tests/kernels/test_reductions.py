"""Numbers from whole tensors: sums of products, histograms, comparisons, the set of largest elements, counts."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit_kernels import dispatch, sums
from toolkit_kernels import reference as by_formula
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import BLOCK, NOTHING, Consensus, Inputs, Keep, Piece, Threshold
from toolkit_kernels.spans import Span

SIZES = (0, 1, 2, 777, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 3, 33 * BLOCK + 7)


def inputs_of(
    cases, num_models, size, *, base=True, dtypes=("bfloat16", "float32", "float16"), seed=0
) -> Inputs:
    rule = "task_arithmetic" if base else "weighted_sum"
    made = cases.piece(rule, num_models, size, dtypes, "float32", seed=seed, layouts=cases.LAYOUTS)
    return made.inputs


def cut(inputs: Inputs, piece_size: int) -> list[Inputs]:
    """A tensor in pieces."""

    def parts(start):
        size = min(piece_size, inputs.size - start)
        base = None if inputs.base is None else inputs.base.part(start, size)
        return Inputs(tuple(span.part(start, size) for span in inputs.theta), base, start=start)

    return [parts(start) for start in range(0, inputs.size, piece_size)]


@pytest.mark.parametrize("base", [False, True], ids=["theta", "delta"])
@pytest.mark.parametrize("num_models", [1, 2, 5, 17, 40])
def test_gram_has_the_bits_of_the_tree(cases, backend, reference, num_models, base):
    for size in SIZES if num_models < 17 else (777, 4 * BLOCK + 3):
        inputs = inputs_of(cases, num_models, size, base=base)
        assert np.array_equal(backend.gram(inputs), reference.gram(inputs)), size


def test_gram_is_the_sum_of_products(cases, any_backend):
    """Against exact sums: the tree of a few levels loses far less than a running sum may."""
    inputs = inputs_of(cases, 3, 5 * BLOCK + 9)
    base = by_formula.read(inputs.base)
    delta = [by_formula.read(span) - base for span in inputs.theta]
    expected = [[math.fsum(a * b) for b in delta] for a in delta]
    assert np.allclose(any_backend.gram(inputs), expected, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("base", [False, True], ids=["theta", "delta"])
def test_histograms(cases, backend, reference, base):
    for size in SIZES:
        inputs = inputs_of(cases, 3, size, base=base)
        upper = backend.histogram(inputs, None)
        assert upper.dtype == np.int64
        assert np.array_equal(upper, reference.histogram(inputs, None))
        assert upper.sum(axis=1).tolist() == [size] * 3
        prefixes = [0x3F00, 0, 0x7FFF]
        assert np.array_equal(backend.histogram(inputs, prefixes), reference.histogram(inputs, prefixes))


def test_histogram_counts_what_it_says(any_backend):
    values = [0.5, -0.5, 0.50001, 1e300, -0.0, 2.0**-149, math.inf]
    inputs = Inputs((Span.of(np.array(values)),))
    # 1e300 becomes infinite in float32, as the comparison with a threshold sees it.
    patterns = [
        struct.unpack("<I", struct.pack("<f", abs(v) if abs(v) < 1e39 else math.inf))[0] for v in values
    ]
    counts = any_backend.histogram(inputs, None)[0]
    assert {int(b): int(counts[b]) for b in np.flatnonzero(counts)} == {
        b: [p >> 16 for p in patterns].count(b) for b in {p >> 16 for p in patterns}
    }
    lower = any_backend.histogram(inputs, [0x3F00])[0]
    assert lower.sum() == 3
    assert lower[0] == 2
    assert [any_backend.nth_equal(inputs, 0, 0x3F000000, n) for n in (1, 2, 3)] == [(1, 0), (2, 1), (2, -1)]
    assert [any_backend.nth_equal(inputs, 0, 0x7F800000, n) for n in (1, 2, 3)] == [(1, 3), (2, 6), (2, -1)]
    assert any_backend.nth_equal(inputs, 0, 5, 1) == (0, -1)


def test_places_of_equal_ones(cases, backend, reference):
    for size in SIZES:
        inputs = inputs_of(cases, 2, size)
        for model, bits in ((0, 0), (0, 0x3E800000), (1, 0x3F000000)):
            many, _ = reference.nth_equal(inputs, model, bits, size + 1)
            for number in {1, 2, many // 2 + 1, max(many, 1), many + 1}:
                found = backend.nth_equal(inputs, model, bits, number)
                assert found == reference.nth_equal(inputs, model, bits, number), (size, number)


LARGEST = 0x7FFFFFFF
BOUNDS = ((0, LARGEST), (0, 1), (0x3E800000, 0x3F000000), (0x3EFFFFFF, 0x3F000000), (0x7F7FFFFF, 0x7F800000))


@pytest.mark.parametrize("base", [False, True], ids=["theta", "delta"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_what_lies_between_bounds(cases, backend, reference, base, bounds):
    for size in SIZES:
        inputs = inputs_of(cases, 3, size, base=base)
        expected, patterns = reference.sift(inputs, [bounds, (1, 2), (0x3F000000, LARGEST)], size)
        counts, found = backend.sift(inputs, [bounds, (1, 2), (0x3F000000, LARGEST)], size)
        assert counts.dtype == np.int64
        assert np.array_equal(counts, expected)
        assert [sorted(row.tolist()) for row in found] == [sorted(row.tolist()) for row in patterns]
        assert all(row.dtype == np.uint32 for row in found)


def test_what_lies_between_bounds_is_what_is_said(any_backend):
    values = np.array([0.5, -0.25, 0.375, -0.4375, 0.0, -0.0, math.inf, -0.5, 0.25, 0.1], np.float32)
    bounds = [(0x3E800000, 0x3F000000)]  # 0.25 and 0.5
    counts, (found,) = any_backend.sift(Inputs((Span.of(values),)), bounds, 10)
    assert counts.tolist() == [[1, 3, 5, 7]]
    assert sorted(found.view(np.float32).tolist()) == [0.375, 0.4375]


def test_no_more_than_asked_lie_between_bounds(cases, any_backend):
    inputs = inputs_of(cases, 2, 5 * BLOCK + 3)
    counts, found = any_backend.sift(inputs, [(0, LARGEST)] * 2, inputs.size)
    for room in (0, 1, 63, 64, 65, BLOCK):
        again, some = any_backend.sift(inputs, [(0, LARGEST)] * 2, room)
        assert np.array_equal(again, counts)
        for row, all_of_them in zip(some, found, strict=True):
            assert len(row) == room
            assert set(row.tolist()) <= set(all_of_them.tolist())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_non_finite(cases, any_backend, dtype):
    values = np.zeros(3 * BLOCK + 5)
    values[[0, 5, BLOCK, 3 * BLOCK + 4]] = [np.nan, np.inf, -np.inf, np.nan]
    largest = cases.span(np.full(len(values), float(torch.finfo(getattr(torch, dtype)).max)), dtype)
    spans = (cases.span(values, dtype), cases.span(np.zeros(len(values)), dtype, "numpy"))
    assert any_backend.non_finite(Inputs(spans)).tolist() == [4, 0]
    assert any_backend.non_finite(Inputs(spans, base=largest)).tolist() == [4, 0, 0]
    assert any_backend.non_finite(Inputs((largest,), base=spans[0])).tolist() == [0, 4]
    assert any_backend.non_finite(Inputs((spans[0].part(0, 0),))).tolist() == [0]


def largest_by_sorting(delta: np.ndarray, count: int) -> set[int]:
    """By magnitude in float32, descending; of equal ones the first."""
    magnitudes = np.abs(delta.astype(np.float32))
    return set(np.lexsort((np.arange(len(delta)), -magnitudes))[: max(count, 0)].tolist())


def members(delta: np.ndarray, threshold: Threshold) -> set[int]:
    patterns = np.abs(delta.astype(np.float32)).view(np.uint32)
    index = np.arange(len(delta))
    chosen = (patterns > threshold.bits) | ((patterns == threshold.bits) & (index <= threshold.last))
    return set(np.flatnonzero(chosen).tolist())


@pytest.mark.parametrize(
    "values", ["bfloat16 near each other", "float32", "all equal", "all zero", "infinite"]
)
@pytest.mark.parametrize("piece_size", [BLOCK, 4 * BLOCK])
def test_the_set_of_largest_elements(cases, any_backend, values, piece_size):
    """Against sorting, where ties are heavy: deltas of bfloat16 in one binade have 128 magnitudes."""
    generator, size = np.random.default_rng(0), 6 * BLOCK + 5
    delta = {
        "bfloat16 near each other": generator.uniform(0.5, 1, size) * generator.choice([-1, 1], size),
        "float32": generator.standard_normal(size),
        "all equal": np.full(size, -0.25),
        "all zero": generator.choice([0.0, -0.0], size),
        "infinite": generator.choice([np.inf, -np.inf, 1.0, 0.0], size),
    }[values]
    span = cases.span(delta, "bfloat16" if values.startswith("bfloat16") else "float32")
    zeros = cases.span(np.zeros(size))
    counts = [-1, 0, 1, 2, BLOCK, size // 3, size // 2, size - 1, size, size + 5]
    inputs = Inputs((span,) * len(counts), zeros)
    thresholds = sums.largest(any_backend, cut(inputs, piece_size), counts)
    read = by_formula.read(span)
    for count, threshold in zip(counts, thresholds, strict=True):
        assert members(read, threshold) == largest_by_sorting(read, count), count
    assert thresholds[0] == thresholds[1] == NOTHING


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_set_of_largest_elements(any_backend, data):
    values = st.sampled_from([0.0, -0.0, 0.1, -0.1, 0.1000001, 1.0, -1.0, 3e38, 1e-45, math.inf])
    rows = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 60))
    theta = [data.draw(st.lists(values, min_size=size, max_size=size)) for _ in range(rows)]
    counts = [data.draw(st.integers(0, size)) for _ in range(rows)]
    arrays = [np.array(row, dtype=np.float32) for row in theta]
    thresholds = sums.largest(any_backend, [Inputs(tuple(Span.of(array) for array in arrays))], counts)
    for array, count, threshold in zip(arrays, counts, thresholds, strict=True):
        assert members(array, threshold) == largest_by_sorting(array, count)


def test_small_tensors_have_the_sets_of_large_ones(cases, any_backend, monkeypatch):
    """A sorted tensor gives what bounds and histograms give, wherever the one piece starts."""
    for dtypes in (("bfloat16",), ("float32", "float64", "float16")):
        inputs = inputs_of(cases, 4, 9 * BLOCK + 5, dtypes=dtypes)
        for moved in (inputs, Inputs(inputs.theta, inputs.base, start=7 * BLOCK), Inputs(inputs.theta)):
            for counts in ([0, 1, 2, 5], [inputs.size, inputs.size - 1, inputs.size // 2, 1000]):
                small = sums.largest(any_backend, [moved], counts)
                for min_sample in (BLOCK, 1 << 20):
                    with monkeypatch.context() as patch:
                        patch.setattr(sums, "SMALL", 0)
                        patch.setattr(sums, "MIN_SAMPLE", min_sample)
                        assert sums.largest(any_backend, [moved], counts) == small
    assert sums.largest(any_backend, [], [3, 0]) == [NOTHING, NOTHING]


class Recorded:
    """A backend that notes what it is asked for."""

    def __init__(self, backend) -> None:
        self._backend, self.asked = backend, []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self._backend, name)


def deltas_by_name(name: str, size: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(size)
    return {
        "normal": normal,
        "few magnitudes": np.rint(normal * 4) / 4,
        "mostly zero": np.where(generator.random(size) < 0.1, normal, 0.0),
        "all zero": np.zeros(size),
        "all equal": np.full(size, -3.5),
        "a step": np.where(np.arange(size) < size // 3, normal, 1000 + normal),
        "sorted": np.sort(normal),
    }[name]


@pytest.mark.parametrize("share", [1e-5, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(
    "values", ["normal", "few magnitudes", "mostly zero", "all zero", "all equal", "a step", "sorted"]
)
def test_bounds_hold_the_smallest_of_the_set(cases, values, share):
    """So that one pass over all elements is enough."""
    size = 4 * sums.SMALL + 77
    delta = deltas_by_name(values, size)
    count = max(int(share * size), 1)
    backend = Recorded(dispatch.backend("auto"))
    pieces = cut(Inputs((cases.span(delta), cases.span(delta[::-1].copy()))), 64 * BLOCK)
    first, second = sums.largest(backend, pieces, [count, size - count])
    assert members(delta, first) == largest_by_sorting(delta, count)
    assert members(delta[::-1], second) == largest_by_sorting(delta[::-1], size - count)
    assert "sift" in backend.asked
    assert "histogram" not in backend.asked


def test_a_misleading_sample_costs_time_only(any_backend):
    """Large elements where the lines of the sample lie, and nowhere else; many that equal none of them."""
    size = 2 * sums.SMALL
    stride = 0.96 * size / (size // 8 // sums.LINE)
    in_sample = np.arange(size) % (int(stride) | 1) < sums.LINE
    delta = np.where(in_sample, 1000.0, np.linspace(1, 2, size)).astype(np.float32)
    delta[0] = 1.0
    inputs = Inputs((Span.of(delta), Span.of(-np.where(in_sample, delta / 1000, delta + 5))))
    counts = [size // 5, size // 2]
    backend = Recorded(any_backend)
    found = sums.largest(backend, [inputs], counts)
    assert "histogram" in backend.asked
    for span, count, threshold in zip(inputs.theta, counts, found, strict=True):
        assert members(span.data, threshold) == largest_by_sorting(span.data, count)


def test_too_many_between_the_bounds_are_left_to_histograms(cases, any_backend, monkeypatch):
    inputs = inputs_of(cases, 3, 2 * sums.SMALL, dtypes=("float32",))
    counts = [sums.SMALL, 5, 100]
    expected = sums.largest(any_backend, [inputs], counts)
    monkeypatch.setattr(sums, "MAX_COLLECTED", 3)
    backend = Recorded(any_backend)
    assert sums.largest(backend, [inputs], counts) == expected
    assert "histogram" in backend.asked


def test_sets_over_many_pieces_and_threads_are_those_of_one_piece(cases, any_backend):
    inputs = inputs_of(cases, 3, sums.SMALL + 5)
    counts = [1, sums.SMALL // 3, sums.SMALL]
    with Pool(4) as pool:
        threaded = sums.largest(any_backend, cut(inputs, 2 * BLOCK), counts, pool.map)
    assert threaded == sums.largest(any_backend, [inputs], counts)


def test_trimming_leaves_as_many_as_asked(cases, any_backend):
    """The threshold of one pass and the mask of the next speak of the same elements."""
    generator, size = np.random.default_rng(0), 9 * BLOCK + 1
    theta = cases.span(np.rint(generator.standard_normal(size) * 4) / 4 + 8, "bfloat16")
    base = cases.span(np.full(size, 7.9), "bfloat16")
    pieces = cut(Inputs((theta,), base), 4 * BLOCK)
    for count in (1, 100, size // 2):
        (threshold,) = sums.largest(any_backend, pieces, [count])
        rule = Consensus(np.ones(1), (Keep(among=threshold),), elect=False, normalize=False, scale=1.0)
        out = cases.empty(size, "float32", "torch")
        outs = [Piece(part, rule, out.part(part.start, part.size)) for part in pieces]
        any_backend.apply(outs)
        assert np.count_nonzero(by_formula.read(out) != by_formula.read(base)) == count
