"""The compiled Triton backend on a GPU: the bits of the CPU, for every rule and every pass."""

import importlib.util
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from toolkit_kernels import dispatch, sums
from toolkit_kernels.rules import BLOCK, Inputs, Piece, WeightedSum
from toolkit_kernels.spans import Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

SIZES = (0, 1, 777, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 3, 100_001)
# Zeros of either sign, subnormals and overflows of each dtype, what lies half-way between two numbers of 16 bits.
SPECIAL = [
    *(0.0, 1.0, 1.5, 65504.0, 65519.9, 65520.0, 1e5, 3.4e38, np.inf, np.nan),
    *(6e-8, 2.9e-8, 6.1e-5, 1e-40, 1e-45, 1.2e-38, 9.2e-41, 1 + 2.0**-8, 1 + 3 * 2.0**-8),
]


@pytest.fixture(scope="module")
def gpu():
    return dispatch.backend("triton", "cuda")


def moved(span: Span | None) -> Span | None:
    """On the GPU; at an odd address where it is at one on the CPU."""
    if span is None:
        return None
    offset = span.address % 16 // span.data.element_size()
    memory = torch.empty(span.size + offset, dtype=span.data.dtype, device="cuda")
    memory[offset:].copy_(span.data)
    return Span.of(memory[offset:])


def inputs_moved(inputs: Inputs) -> Inputs:
    return replace(
        inputs,
        theta=tuple(map(moved, inputs.theta)),
        base=moved(inputs.base),
        fisher=tuple(map(moved, inputs.fisher)),
    )


def assert_same_bits(cases, gpu, reference, pieces: list[Piece]) -> None:
    on_gpu = [Piece(inputs_moved(piece.inputs), piece.rule, moved(piece.out)) for piece in pieces]
    assert gpu.apply(on_gpu).tolist() == reference.apply(pieces).tolist()
    cases.assert_same(on_gpu, pieces)


@pytest.mark.parametrize("num_models", [1, 2, 4, 16, 17, 40])
def test_bits_are_those_of_the_reference(cases, gpu, reference, num_models):
    """Every rule, every mix of dtypes, every size, aligned and not: one call."""
    rule_names = [name for name in cases.RULES if name != "near_swap" or num_models == 1]
    combinations = itertools.product(rule_names, zip(SIZES, cases.MIXES, strict=True), cases.TORCH_LAYOUTS)
    pieces = [
        cases.piece(
            rule_name,
            num_models,
            size,
            *mix,
            seed=seed,
            start=cases.STARTS[seed % len(cases.STARTS)],
            layouts=(layout,),
        )
        for seed, (rule_name, (size, mix), layout) in enumerate(combinations)
    ]
    assert_same_bits(cases, gpu, reference, pieces)


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_special_values(cases, gpu, reference, out_dtype):
    signed = [*SPECIAL, *(-value for value in SPECIAL)]
    triples = np.array(list(itertools.product(signed, signed, SPECIAL))).T
    pieces = []
    for rule_name, in_dtype in itertools.product(cases.RULES, ("float16", "bfloat16", "float32")):
        theta_0, theta_1, third = (cases.span(row, in_dtype) for row in triples)
        theta = (theta_0,) if rule_name == "near_swap" else (theta_0, theta_1)
        fisher = (third, cases.span(triples[2][::-1], in_dtype)) if rule_name in cases.NEEDS_FISHER else ()
        base = None if rule_name in cases.NEEDS_NO_BASE else third
        rule = cases.RULES[rule_name](np.random.default_rng(1), len(theta), 0)
        pieces.append(Piece(Inputs(theta, base, fisher), rule, cases.empty(third.size, out_dtype, "torch")))
    assert_same_bits(cases, gpu, reference, pieces)


@pytest.mark.parametrize("layout", ["torch", "torch_odd"])
@pytest.mark.parametrize("rule_name", ["base_and_sum", "weighted_sum"])
@pytest.mark.parametrize("size", [0, 1, BLOCK, 300_001])
def test_passes_are_those_of_the_reference(cases, gpu, reference, rule_name, size, layout):
    dtypes = ("bfloat16", "float32", "float16")
    inputs = cases.piece(rule_name, 5, size, dtypes, "float32", layouts=(layout,)).inputs
    there = inputs_moved(inputs)
    assert gpu.gram(there).tolist() == reference.gram(inputs).tolist()
    upper = reference.histogram(inputs, None)
    assert (gpu.histogram(there, None) == upper).all()
    prefixes = [int(row.argmax()) for row in upper]
    lower = reference.histogram(inputs, prefixes)
    assert (gpu.histogram(there, prefixes) == lower).all()
    for model, prefix in enumerate(prefixes):
        bits = (prefix << 16) | int(lower[model].argmax())
        number = max(int(lower[model].max()), 1)
        assert gpu.nth_equal(there, model, bits, number) == reference.nth_equal(inputs, model, bits, number)
    bounds = [(prefix << 16, (prefix << 16) + 0x20000) for prefix in prefixes]
    counts, found = gpu.sift(there, bounds, size)
    expected, patterns = reference.sift(inputs, bounds, size)
    assert counts.tolist() == expected.tolist()
    assert [row.tolist() for row in found] == [row.tolist() for row in patterns]
    assert gpu.non_finite(there).tolist() == reference.non_finite(inputs).tolist()
    counts = [size // 3] * 5
    assert sums.largest(gpu, [there], counts) == sums.largest(reference, [inputs], counts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["torch", "torch_odd"])
@pytest.mark.parametrize("size", [0, 1, 300_001])
def test_squares_are_added(cases, gpu, reference, dtype, layout, size):
    values = cases.span(cases.parameters(np.random.default_rng(0), size), dtype, layout)
    total = cases.span(np.arange(size) / 3, "float32", layout)
    for scale in (1.0, 0.37, -1.0, 0.0):
        there = moved(total)
        gpu.add_squares(there, moved(values), scale)
        expected = cases.span(np.arange(size) / 3, "float32", layout)
        reference.add_squares(expected, values, scale)
        assert (cases.bits(there) == cases.bits(expected)).all()


def test_the_output_may_be_an_input(cases, gpu, reference):
    piece = cases.piece("fisher", 3, 300_001, ("bfloat16",), "bfloat16")
    reference.apply([piece])
    there = inputs_moved(piece.inputs)
    in_place = Piece(there, piece.rule, there.theta[0])
    gpu.apply([in_place])
    cases.assert_same([in_place], [piece])


def test_another_stream_than_the_default_one(cases, gpu, reference):
    piece = cases.piece("weighted_sum", 2, 300_001, ("bfloat16",), "bfloat16")
    reference.apply([piece])
    on_gpu = Piece(inputs_moved(piece.inputs), piece.rule, moved(piece.out))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gpu.apply([on_gpu])
    cases.assert_same([on_gpu], [piece])


def test_more_elements_than_32_bits_can_count(gpu):
    """2**31 + 5 elements of bfloat16 in three tensors: 13 GB."""
    size = (1 << 31) + 5
    needed = 4 * size * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory on the GPU")
    a, b = (torch.full((size,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 3.0))
    out = torch.zeros_like(a)
    spans = (Span.of(a), Span.of(b))
    assert gpu.apply([Piece(Inputs(spans), WeightedSum(np.array([0.5, 0.5])), Span.of(out))]).tolist() == [0]
    assert out[-5:].tolist() == [2.0] * 5
    assert (out == 2).all().item()


def test_memory_of_two_devices_is_refused(gpu):
    x, y = Span.of(torch.ones(3, device="cuda")), Span.of(torch.ones(3))
    with pytest.raises(ValueError, match="different devices"):
        gpu.apply([Piece(Inputs((x,)), WeightedSum(np.ones(1)), y)])
