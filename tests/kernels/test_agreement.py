"""Every backend has the bits of the float64 reference: rules, dtypes, numbers of models, sizes, layouts."""

import functools
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit_kernels import reference as by_formula
from toolkit_kernels.philox import random_words
from toolkit_kernels.rules import BLOCK, Consensus, Inputs, Keep, Piece, Threshold, WeightedSum
from toolkit_kernels.spans import Span

RULE_NAMES = [
    "weighted_sum",
    "base_and_sum",
    "fisher",
    "fisher_floor",
    "task_arithmetic",
    "task_mean",
    "ties",
    "ties_sum",
    "breadcrumbs",
    "dare",
    "dare_ties",
    "ties_at_random",
    "zeros_up_to",
    "keep_everything",
    "keep_nothing",
    "drop_everything",
    "signed_weights",
    "near_swap",
]
# Each bit pattern class of a 16-bit float, and what overflows or becomes subnormal on the way to it.
SPECIAL = [
    *(0.0, 1.0, 1.5, 65504.0, 65519.9, 65520.0, 1e5, 3.4e38, np.inf, np.nan),
    *(6e-8, 2.9e-8, 6.1e-5, 1e-40, 1e-45, 1.2e-38, 9.2e-41, 1 + 2.0**-8, 1 + 3 * 2.0**-8),
]


def test_no_rule_is_forgotten(cases):
    assert sorted(RULE_NAMES) == sorted(cases.RULES)


@functools.cache
def pieces_and_results(cases, reference, rule_name, num_models):
    """All sizes and mixes of dtypes for few models; for many, each size with another mix. Layouts take turns."""
    if num_models <= 5:
        combinations = list(itertools.product(cases.SIZES, cases.MIXES))
    else:
        combinations = list(zip(cases.SIZES, itertools.cycle(cases.MIXES)))
    pieces = [
        cases.piece(
            rule_name,
            num_models,
            size,
            *mix,
            seed=seed,
            start=cases.STARTS[seed % len(cases.STARTS)],
            layouts=cases.LAYOUTS,
        )
        for seed, (size, mix) in enumerate(combinations)
    ]
    expected = [cases.with_out(piece) for piece in pieces]
    return pieces, expected, reference.apply(expected)


@pytest.mark.parametrize(
    ("rule_name", "num_models"),
    [*itertools.product(RULE_NAMES[:-1], [1, 2, 3, 4, 5, 16, 17, 40]), ("near_swap", 1)],
)
def test_bits_are_those_of_the_reference(cases, backend, reference, rule_name, num_models):
    pieces, expected, counts = pieces_and_results(cases, reference, rule_name, num_models)
    for piece in pieces:
        piece.out.data[:] = 0
    assert backend.apply(pieces).tolist() == counts.tolist()
    cases.assert_same(pieces, expected)


@functools.cache
def special_piece(cases, rule_name, in_dtype):
    """Every pair of special values as two models, with every third as base or Fisher information."""
    signed = [*SPECIAL, *(-value for value in SPECIAL)]
    triples = np.array(list(itertools.product(signed, signed, SPECIAL))).T
    theta_0, theta_1, third = (cases.span(row, in_dtype) for row in triples)
    theta = (theta_0,) if rule_name == "near_swap" else (theta_0, theta_1)
    rule = cases.RULES[rule_name](np.random.default_rng(1), len(theta), 0)
    fisher = (third, cases.span(triples[2][::-1], in_dtype)) if rule_name in cases.NEEDS_FISHER else ()
    base = None if rule_name in cases.NEEDS_NO_BASE else third
    return Piece(Inputs(theta, base, fisher), rule, third)


@functools.cache
def special_result(cases, reference, rule_name, in_dtype, out_dtype):
    piece = special_piece(cases, rule_name, in_dtype)
    expected = cases.with_out(piece, cases.empty(piece.inputs.size, out_dtype, "torch"))
    return expected, reference.apply([expected]).tolist()


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("in_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rule_name", RULE_NAMES)
def test_special_values(cases, backend, reference, rule_name, in_dtype, out_dtype):
    expected, counts = special_result(cases, reference, rule_name, in_dtype, out_dtype)
    assert counts[0] > 0
    piece = cases.with_out(expected)
    assert backend.apply([piece]).tolist() == counts
    cases.assert_same([piece], [expected])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_dtype_and_number_of_models(cases, backend, reference, data):
    shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
    num_models = data.draw(st.integers(1, 20))
    floats = st.sampled_from(cases.FLOATS)
    rule_name = data.draw(st.sampled_from([name for name in RULE_NAMES if name != "near_swap"]))
    piece = cases.piece(
        rule_name,
        num_models,
        int(np.prod(shape, dtype=int)),
        data.draw(st.lists(floats, min_size=1, max_size=4)),
        data.draw(floats),
        seed=data.draw(st.integers(0, 99)),
        start=data.draw(st.integers(0, 1 << 30)) * BLOCK,
        layouts=data.draw(st.permutations(cases.LAYOUTS)),
    )
    expected = cases.with_out(piece)
    assert backend.apply([piece]).tolist() == reference.apply([expected]).tolist()
    cases.assert_same([piece], [expected])


def test_a_tensor_without_dimensions(any_backend):
    a, b, out = torch.tensor(1.5), torch.tensor(2.5, dtype=torch.bfloat16), torch.tensor(0.0)
    inputs = Inputs((Span.of(a), Span.of(b)))
    assert any_backend.apply([Piece(inputs, WeightedSum(np.array([0.5, 0.5])), Span.of(out))]).tolist() == [0]
    assert out.item() == 2.0
    assert out.shape == ()


@pytest.mark.parametrize("rule_name", ["base_and_sum", "fisher", "ties", "dare_ties"])
@pytest.mark.parametrize("which", ["first", "last"])
def test_the_output_may_be_an_input(cases, any_backend, rule_name, which):
    """In place: the fallback of a Fisher mean and the second pass of an election read inputs late."""
    piece = cases.piece(rule_name, 3, 2 * BLOCK + 5, ("bfloat16",), "bfloat16")
    expected = cases.with_out(piece)
    any_backend.apply([expected])
    in_place = cases.with_out(piece, piece.inputs.theta[0 if which == "first" else -1])
    any_backend.apply([in_place])
    cases.assert_same([in_place], [expected])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_inputs_are_only_read(cases, any_backend, dtype):
    cases.assert_inputs_are_only_read(any_backend, dtype)


def test_nothing_is_written_beside_the_output(cases, any_backend):
    """A guard on either side of an output that starts and ends at odd elements."""
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        memory = torch.full((3 * BLOCK + 11,), 7.0, dtype=getattr(torch, dtype))
        size = 3 * BLOCK + 1
        piece = cases.piece("weighted_sum", 2, size, (dtype,), dtype)
        any_backend.apply([cases.with_out(piece, Span.of(memory[5 : 5 + size]))])
        assert memory[:5].tolist() == [7.0] * 5
        assert memory[5 + size :].tolist() == [7.0] * 5


def test_read_only_memory_gives_no_warning(cases, any_backend):
    """A mapped file is read-only; torch would warn of undefined behaviour."""
    piece = cases.piece("ties", 2, 100, ("bfloat16", "float32"), "float32", layouts=("numpy_unaligned",))
    assert not piece.inputs.theta[0].data.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        any_backend.apply([piece])
        any_backend.gram(piece.inputs)
        any_backend.non_finite(piece.inputs)


def element_by_element(rule: Consensus, theta, base, start: int) -> list[float]:
    """The docstring of ``Consensus`` in plain Python, one element at a time."""
    results = []
    for i, theta_0 in enumerate(base):
        values = []
        for weight, keep, theta_k in zip(rule.weights.tolist(), rule.keep, theta, strict=True):
            delta = theta_k[i] - theta_0
            magnitude = int(np.float32(abs(delta)).view(np.uint32))

            def holds(threshold: Threshold, magnitude=magnitude, index=start + i) -> bool:
                return magnitude > threshold.bits or (magnitude == threshold.bits and index <= threshold.last)

            stays = keep.among is None or holds(keep.among)
            stays = stays and (keep.outside is None or not holds(keep.outside))
            if stays and keep.probability is not None:
                word = int(random_words(keep.key, keep.stream, start + i, 1)[0])
                stays = word < int(keep.probability * 2**32)
            values.append(weight * (keep.rescale * delta) if stays else 0.0)
        total, divisor, elected = 0.0, 0.0, 0.0
        for value in values:
            total += value
        sign = 1 if total >= 0 else -1
        for weight, value in zip(rule.weights.tolist(), values, strict=True):
            if not rule.elect or (value > 0 and sign > 0) or (value < 0 and sign < 0):
                elected += value
                divisor += weight
        cancelled = abs(divisor) <= 1e-12 * sum(abs(weight) for weight in rule.weights.tolist())
        mean = elected / (1.0 if cancelled else divisor) if rule.normalize else elected
        results.append(theta_0 + rule.scale * mean)
    return results


thresholds = st.none() | st.builds(
    Threshold, st.sampled_from([0, 0x3E800000, 0x3F000000, 0x3F800000, 0xFFFFFFFF]), st.integers(-1, 6)
)
keeps = st.builds(
    Keep,
    among=thresholds,
    outside=thresholds,
    probability=st.none() | st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    stream=st.integers(0, 2**32 - 1),
    rescale=st.sampled_from([1.0, 2.0, 1 / 0.3]),
)
# Sums that cancel to zero, ties of magnitude and equal signs come up often among so few numbers.
numbers = st.sampled_from([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 1 / 3, -0.1, 3.0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_consensus_is_what_its_docstring_says(cases, any_backend, data):
    num_models, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    row = st.lists(numbers, min_size=size, max_size=size)
    theta, base = [data.draw(row) for _ in range(num_models)], data.draw(row)
    weight = st.sampled_from([0.0, 0.5, -0.5, 1.0, 1 / 3, 0.1, 0.2, -0.3])
    one_for_all = weight.map(lambda w: [w] * num_models)
    rule = Consensus(
        np.array(data.draw(one_for_all | st.lists(weight, min_size=num_models, max_size=num_models))),
        tuple(data.draw(keeps) for _ in range(num_models)),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([1.0, 0.7, -2.0])),
    )
    start = data.draw(st.sampled_from([0, BLOCK, 1 << 35]))
    if start:
        rule = shifted(rule, start)
    out = Span.of(torch.empty(size, dtype=torch.float64))
    spans = tuple(Span.of(np.array(values)) for values in theta)
    any_backend.apply([Piece(Inputs(spans, Span.of(np.array(base)), start=start), rule, out)])
    expected = np.array(element_by_element(rule, theta, base, start))
    assert by_formula.read(out).view(np.uint64).tolist() == expected.view(np.uint64).tolist()


def test_a_tied_election_is_won_by_the_positive(any_backend):
    """sum_k v_k = 0 elects +1: TIES leaves it open. Where nothing stays, the divisor counts as one."""
    theta = tuple(Span.of(np.array(row)) for row in ([1.0, 2.0, 0.0, -1.0], [-1.0, 0.0, 0.0, -1.0]))
    base, out = Span.of(np.zeros(4)), Span.of(np.empty(4))
    rule = Consensus(np.array([0.5, 0.5]), (Keep(), Keep()), elect=True, normalize=True, scale=1.0)
    any_backend.apply([Piece(Inputs(theta, base), rule, out)])
    assert out.data.tolist() == [1.0, 2.0, 0.0, -1.0]


@pytest.mark.parametrize("elect", [True, False])
def test_weights_that_cancel_but_for_rounding_divide_by_one(cases, any_backend, elect):
    """0.1 + 0.2 - 0.3 is 5.6e-17; deltas with the signs of the weights all have the elected one."""
    cases.assert_cancelled_weights_divide_by_one(any_backend, elect)


def shifted(rule: Consensus, start: int) -> Consensus:
    """The same thresholds for a piece that starts elsewhere."""

    def move(threshold):
        return None if threshold is None else replace(threshold, last=threshold.last + start)

    keep = tuple(replace(each, among=move(each.among), outside=move(each.outside)) for each in rule.keep)
    return replace(rule, keep=keep)
