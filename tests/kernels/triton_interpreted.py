"""The Triton backend in Triton's interpreter, on memory of the CPU.

test_triton_backend.py runs this in a process of its own. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpreted.py
"""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from toolkit_kernels import dispatch, sums
from toolkit_kernels.rules import BLOCK, Consensus, Inputs, Keep, NearSwap, Piece, Threshold, WeightedSum
from toolkit_kernels.spans import Span
from toolkit_kernels.triton_backend import launch
from toolkit_kernels.triton_backend.backend import GRAM_ROWS, INTERPRETED, PASS_BLOCK

# Python warns of the NaN and infinities that a GPU computes in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

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
SIZES = (0, 1, 777, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1)
SPECIAL = [
    0.0,
    1.0,
    1.5,
    65504.0,
    65520.0,
    3.4e38,
    np.inf,
    np.nan,
    6e-8,
    2.9e-8,
    1e-40,
    9.2e-41,
    1 + 3 * 2.0**-8,
]
# Philox4x32-10 with counter and key zero, from the known answers of Random123 (kat_vectors).
KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.fixture(scope="module")
def triton_backend():
    assert INTERPRETED
    return dispatch.backend("triton")


def test_no_rule_is_forgotten(cases):
    assert sorted(RULE_NAMES) == sorted(cases.RULES)


@pytest.mark.parametrize(
    ("rule_name", "num_models"),
    [
        ("near_swap", 1),
        *itertools.product([name for name in RULE_NAMES if name != "near_swap"], [1, 3]),
        *itertools.product(["weighted_sum", "fisher", "breadcrumbs", "dare_ties"], [16, 17]),
    ],
)
def test_bits_are_those_of_the_reference(cases, triton_backend, reference, rule_name, num_models):
    """Each size with another mix of dtypes and another layout, all in one call; 17 models are a loop of the device."""
    pieces = [
        cases.piece(
            rule_name,
            num_models,
            size,
            *mix,
            seed=seed,
            start=cases.STARTS[seed % len(cases.STARTS)],
            layouts=cases.LAYOUTS[seed % len(cases.LAYOUTS) :][:1],
        )
        for seed, (size, mix) in enumerate(zip(SIZES, cases.MIXES, strict=True))
        if num_models < 16 or seed in (1, 5, 7)
    ]
    expected = [cases.with_out(piece) for piece in pieces]
    assert triton_backend.apply(pieces).tolist() == reference.apply(expected).tolist()
    cases.assert_same(pieces, expected)


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rule_name", RULE_NAMES)
def test_special_values(cases, triton_backend, reference, monkeypatch, rule_name, out_dtype):
    """Pairs of zeros of either sign, subnormals, overflows, infinities, NaN, in every dtype that they come in."""
    for name in launch.BLOCKS:
        monkeypatch.setitem(
            launch.BLOCKS, name, 8192
        )  # fewer programs: each costs the interpreter milliseconds
    signed = [*SPECIAL, *(-value for value in SPECIAL)]
    triples = np.array(list(itertools.product(signed, signed, SPECIAL))).T
    results = []
    for in_dtype in ("float16", "bfloat16", "float32"):
        theta_0, theta_1, third = (cases.span(row, in_dtype) for row in triples)
        theta = (theta_0,) if rule_name == "near_swap" else (theta_0, theta_1)
        fisher = (third, cases.span(triples[2][::-1], in_dtype)) if rule_name in cases.NEEDS_FISHER else ()
        base = None if rule_name in cases.NEEDS_NO_BASE else third
        rule = cases.RULES[rule_name](np.random.default_rng(1), len(theta), 0)
        results.append(Piece(Inputs(theta, base, fisher), rule, cases.empty(third.size, out_dtype, "torch")))
    expected = [cases.with_out(piece) for piece in results]
    counts = triton_backend.apply(results).tolist()
    assert counts == reference.apply(expected).tolist()
    assert min(counts) > 0
    cases.assert_same(results, expected)


def test_random_words_are_the_known_ones(triton_backend):
    """A word is below word + 1 and not below itself."""
    base, theta = torch.zeros(4), torch.ones(4)
    for i, word in enumerate(KNOWN_WORDS):
        for more, stays in ((0, 0.0), (1, 1.0)):
            out = torch.empty(4)
            rule = Consensus(np.ones(1), (Keep(probability=(word + more) / 2**32),), False, False, 1.0)
            triton_backend.apply([Piece(Inputs((Span.of(theta),), Span.of(base)), rule, Span.of(out))])
            assert out[i].item() == stays


@pytest.mark.parametrize("layout", ["torch", "numpy_unaligned"])
@pytest.mark.parametrize("num_blocks", [0, 1, GRAM_ROWS, GRAM_ROWS + 1, 3 * GRAM_ROWS])
@pytest.mark.parametrize("with_base", [True, False])
def test_passes_are_those_of_the_reference(cases, triton_backend, reference, with_base, num_blocks, layout):
    rule_name = "base_and_sum" if with_base else "weighted_sum"
    size = max(num_blocks * BLOCK - (7 if num_blocks % 2 else 0), 0)
    inputs = cases.piece(
        rule_name, 3, size, ("bfloat16", "float32", "float16"), "float32", layouts=(layout,)
    ).inputs
    assert triton_backend.gram(inputs).tolist() == reference.gram(inputs).tolist()
    upper = reference.histogram(inputs, None)
    assert (triton_backend.histogram(inputs, None) == upper).all()
    prefixes = [int(row.argmax()) for row in upper]
    lower = reference.histogram(inputs, prefixes)
    assert (triton_backend.histogram(inputs, prefixes) == lower).all()
    for model in range(3):
        bits_of_most = (prefixes[model] << 16) | int(lower[model].argmax())
        for number in {1, max(int(lower[model].max()), 1), size + 1}:
            place = triton_backend.nth_equal(inputs, model, bits_of_most, number)
            assert place == reference.nth_equal(inputs, model, bits_of_most, number)
    bounds = [(prefix << 16, (prefix << 16) + 0x20000) for prefix in prefixes]
    counts, found = triton_backend.sift(inputs, bounds, size)
    expected, patterns = reference.sift(inputs, bounds, size)
    assert counts.tolist() == expected.tolist()
    assert [row.tolist() for row in found] == [row.tolist() for row in patterns]
    assert triton_backend.non_finite(inputs).tolist() == reference.non_finite(inputs).tolist()


@pytest.mark.parametrize("size", [1, PASS_BLOCK, PASS_BLOCK + 1])
def test_what_is_not_finite_is_counted(cases, triton_backend, size):
    values = np.ones(size)
    values[-1] = np.nan
    values[0] = -np.inf
    spans = tuple(cases.span(values, dtype) for dtype in ("float16", "bfloat16", "float32", "float64"))
    expected = min(size, 2)
    assert triton_backend.non_finite(Inputs(spans, spans[0])).tolist() == [expected] * 5


@pytest.mark.parametrize("scale", [1.0, 0.37, -1.0, 0.0])
@pytest.mark.parametrize("layout", ["torch", "torch_odd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_squares_are_added(cases, triton_backend, reference, dtype, layout, scale):
    for size in (0, 1, PASS_BLOCK, PASS_BLOCK + 1):
        generator = np.random.default_rng(size)
        values = cases.span(cases.parameters(generator, size), dtype, layout)
        totals = [cases.span(np.arange(size) / 3, "float32", layout) for _ in range(2)]
        for each, total in zip((triton_backend, reference), totals, strict=True):
            each.add_squares(total, values, scale)
        assert (cases.bits(totals[0]) == cases.bits(totals[1])).all()


def test_squares_are_scaled_before_they_overflow(triton_backend):
    total = torch.zeros(1)
    triton_backend.add_squares(Span.of(total), Span.of(torch.tensor([1e160], dtype=torch.float64)), 1e-300)
    assert total.item() == torch.tensor(1e20).item()


def test_values_that_cancel_elect_the_positive_sign(triton_backend):
    theta, base, out = torch.tensor([1.0]), torch.tensor([0.0]), torch.empty(1)
    spans = Span.of(theta), Span.of(-theta)
    rule = Consensus(np.array([0.5, 0.5]), (Keep(), Keep()), elect=True, normalize=False, scale=1.0)
    triton_backend.apply([Piece(Inputs(spans, Span.of(base)), rule, Span.of(out))])
    assert out.item() == 0.5


def test_what_lies_beyond_the_end_is_not_counted(triton_backend):
    """An infinite weight makes a NaN of the zeros that are read there."""
    x = Span.of(torch.ones(5))
    piece = Piece(Inputs((x,)), WeightedSum(np.array([np.inf])), Span.of(torch.empty(5)))
    assert triton_backend.apply([piece]).tolist() == [5]


def test_sets_of_largest_elements(cases, triton_backend, reference):
    """Magnitudes that tie, over several pieces."""
    inputs = cases.piece("base_and_sum", 2, 3 * BLOCK, ("float32",), "float32").inputs
    pieces = [
        replace(
            inputs,
            theta=tuple(span.part(start, BLOCK) for span in inputs.theta),
            base=inputs.base.part(start, BLOCK),
            start=start,
        )
        for start in range(0, 3 * BLOCK, BLOCK)
    ]
    for counts in ([0, 1], [BLOCK, 2 * BLOCK + 5], [3 * BLOCK, 17]):
        assert sums.largest(triton_backend, pieces, counts) == sums.largest(reference, pieces, counts)


@pytest.mark.parametrize("rule_name", ["base_and_sum", "fisher", "dare_ties"])
@pytest.mark.parametrize("which", [0, -1])
def test_the_output_may_be_an_input(cases, triton_backend, rule_name, which):
    piece = cases.piece(rule_name, 3, 2 * BLOCK + 5, ("bfloat16",), "bfloat16")
    expected = cases.with_out(piece)
    triton_backend.apply([expected])
    in_place = cases.with_out(piece, piece.inputs.theta[which])
    triton_backend.apply([in_place])
    cases.assert_same([in_place], [expected])


@pytest.mark.parametrize("elect", [True, False])
def test_weights_that_cancel_but_for_rounding_divide_by_one(cases, triton_backend, elect):
    cases.assert_cancelled_weights_divide_by_one(triton_backend, elect)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_inputs_are_only_read(cases, triton_backend, dtype):
    cases.assert_inputs_are_only_read(triton_backend, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_nothing_is_written_beside_the_output(cases, triton_backend, dtype):
    size = BLOCK + 1
    memory = torch.full((size + 10,), 7.0, dtype=getattr(torch, dtype))
    piece = cases.piece("weighted_sum", 2, size, (dtype,), dtype)
    triton_backend.apply([cases.with_out(piece, Span.of(memory[5 : 5 + size]))])
    assert memory[:5].tolist() == memory[5 + size :].tolist() == [7.0] * 5


def test_a_state_dict_is_one_launch(cases):
    """Tensors of any sizes, empty ones too; another dtype or an odd address needs a launch of its own."""
    pieces = [cases.piece("weighted_sum", 3, size, ("bfloat16",), "bfloat16") for size in range(0, 9000, 97)]
    cpu = torch.device("cpu")
    (only,) = launch.prepare(pieces, cpu)
    block = launch.BLOCKS["WeightedSum"]
    wanted = [
        (row, chunk)
        for row, piece in enumerate(p for p in pieces if p.out.size)
        for chunk in range(-(-piece.out.size // block))
    ]
    assert only.chunks.tolist() == [list(pair) for pair in wanted]
    odd = cases.piece("weighted_sum", 3, 50, ("bfloat16",), "bfloat16", layouts=("torch_odd",))
    other = cases.piece("weighted_sum", 3, 50, ("float32", "bfloat16"), "bfloat16")
    variants = [each.variant for each in launch.prepare([*pieces, odd, other], cpu)]
    assert [(variant.aligned, variant.theta[0]) for variant in variants] == [
        (True, "bfloat16"),
        (False, "bfloat16"),
        (True, "float32"),
    ]


def test_weights_differ_from_tensor_to_tensor(cases, triton_backend, reference):
    """Numbers are read from a tensor's row: the same launch, other weights, thresholds, keys and starts."""
    pieces = [
        cases.piece(name, 2, 300 + seed, ("bfloat16",), "bfloat16", seed=seed, start=seed * BLOCK)
        for name in ("weighted_sum", "fisher_floor", "ties", "dare_ties")
        for seed in range(1, 4)
        if name != "near_swap"
    ]
    pieces += [
        replace(
            cases.piece("near_swap", 1, 300, ("bfloat16",), "bfloat16", seed=seed), rule=NearSwap(0.1 * seed)
        )
        for seed in range(3)
    ]
    expected = [cases.with_out(piece) for piece in pieces]
    assert triton_backend.apply(pieces).tolist() == reference.apply(expected).tolist()
    cases.assert_same(pieces, expected)


def test_calls_from_several_threads(cases, triton_backend, reference):
    pieces = [cases.piece("ties", 3, 2500, ("bfloat16",), "bfloat16", seed=seed) for seed in range(4)]
    expected = [cases.with_out(piece) for piece in pieces]
    reference.apply(expected)
    threads = [threading.Thread(target=triton_backend.apply, args=([piece],)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cases.assert_same(pieces, expected)


@pytest.mark.parametrize("rule", [WeightedSum(np.ones(1), 1.0), NearSwap(0.1), "consensus"])
def test_a_rule_that_needs_a_base_says_so(triton_backend, rule):
    if rule == "consensus":
        rule = Consensus(np.ones(1), (Keep(among=Threshold(0, 0)),), False, False, 1.0)
    x = Span.of(torch.ones(3))
    with pytest.raises(ValueError, match="needs a base"):
        triton_backend.apply([Piece(Inputs((x,)), rule, x)])


def test_no_piece_is_no_work(triton_backend):
    assert triton_backend.apply([]).tolist() == []
