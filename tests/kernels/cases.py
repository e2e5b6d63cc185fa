"""What the kernel tests share: spans in every layout, rules, inputs, and bits that can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from toolkit_kernels import reference
from toolkit_kernels.backend import Backend
from toolkit_kernels.rules import (
    BLOCK,
    Consensus,
    FisherMean,
    Inputs,
    Keep,
    NearSwap,
    Piece,
    Rule,
    Threshold,
    WeightedSum,
)
from toolkit_kernels.spans import CARRIERS, CODES, ITEMSIZES, Span

FLOATS = tuple(CODES)
# The last one is more than one chunk of the torch backend, whatever the number of models, and a tail.
SIZES = (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 777, 4 * BLOCK + 3, 17 * BLOCK + 7)
# All models alike, or each another; the second is the output.
MIXES = (
    (("bfloat16",), "bfloat16"),
    (("float16",), "float16"),
    (("float32",), "float32"),
    (("float64",), "float64"),
    (("bfloat16",), "float32"),
    (("float32",), "bfloat16"),
    (("float32", "bfloat16", "float16", "float64"), "bfloat16"),
    (("float16", "float64", "bfloat16"), "float16"),
)
# Numpy at an address of 2 modulo 16 and read-only, as a mapped file gives it; torch from the third element on.
LAYOUTS = ("numpy", "numpy_unaligned", "torch", "torch_odd")
TORCH_LAYOUTS = ("torch", "torch_odd")
# Starts of a piece in its tensor: the counter of Philox and the last index of a threshold go beyond 32 bits.
STARTS = (0, 3 * BLOCK, 1 << 34)
HALF = 0x3F000000  # the bits of 0.5


def empty(size: int, dtype: str, layout: str) -> Span:
    """A span of ``size`` elements in one of the layouts, writable."""
    if layout.startswith("torch"):
        offset = 3 if layout == "torch_odd" else 0
        return Span.of(torch.empty(size + offset, dtype=getattr(torch, dtype))[offset:])
    memory = np.empty(size * ITEMSIZES[dtype] + 32, dtype=np.uint8)
    shift = (2 if layout == "numpy_unaligned" else 0) - memory.ctypes.data
    flat = memory[shift % 16 :][: size * ITEMSIZES[dtype]].view(CARRIERS[dtype])
    assert flat.ctypes.data % 16 == (2 if layout == "numpy_unaligned" else 0)
    return Span(flat, dtype)


def span(values: np.ndarray, dtype: str = "float32", layout: str = "torch") -> Span:
    """Values, rounded to ``dtype``, in one of the layouts."""
    result = empty(len(values), dtype, layout)
    reference.write(result, np.asarray(values, dtype=np.float64))
    if layout == "numpy_unaligned":
        result.data.flags.writeable = False
    return result


def bits(result: Span) -> np.ndarray:
    """The bit patterns as integers; NaN, whose payload depends on the processor, always the same."""
    values = reference.read(result)
    if isinstance(result.data, np.ndarray):
        patterns = result.data.view(f"u{ITEMSIZES[result.dtype]}")
    else:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEMSIZES[result.dtype]]
        patterns = result.data.cpu().view(integer).numpy().view(f"u{ITEMSIZES[result.dtype]}")
    return np.where(np.isnan(values), patterns.dtype.type(~patterns.dtype.type(0)), patterns)


def parameters(generator: np.random.Generator, size: int) -> np.ndarray:
    """Numbers of a few binades; one in three a multiple of 1/4, so that magnitudes tie; some zeros of either sign."""
    values = generator.standard_normal(size) * np.exp2(generator.integers(-6, 3, size))
    values = np.where(generator.random(size) < 0.33, np.rint(values * 4) / 4, values)
    return np.where(generator.random(size) < 0.02, -0.0, values)


def fishers(generator: np.random.Generator, num_models: int, size: int) -> list[np.ndarray]:
    """Squares over many orders of magnitude; some zero, some zero in every model."""
    everywhere = generator.random(size) < 0.03
    result = []
    for _ in range(num_models):
        values = generator.standard_normal(size) ** 2 * np.exp2(generator.integers(-12, 3, size))
        result.append(np.where(everywhere | (generator.random(size) < 0.1), 0.0, values))
    return result


def _weights(generator: np.random.Generator, num_models: int) -> np.ndarray:
    weights = generator.random(num_models) + 0.1
    return weights / weights.sum()


def _keeps(num_models: int, **settings) -> tuple[Keep, ...]:
    return tuple(Keep(stream=k, key=(0x12345678, 0xFEDCBA98), **settings) for k in range(num_models))


def _consensus(elect: bool, normalize: bool, scale: float = 1.0, **settings) -> Callable[..., Rule]:
    def make(generator: np.random.Generator, num_models: int, start: int) -> Rule:
        # A threshold's last index lies within the piece, wherever that starts.
        moved = {
            name: replace(value, last=value.last + start) if isinstance(value, Threshold) else value
            for name, value in settings.items()
        }
        return Consensus(
            _weights(generator, num_models), _keeps(num_models, **moved), elect, normalize, scale
        )

    return make


def _signed_weights(generator: np.random.Generator, num_models: int, start: int) -> Rule:
    """Zero and negative weights: some divisors are zero."""
    weights = np.resize([0.0, 0.5, -0.5], num_models)
    return Consensus(weights, _keeps(num_models), True, True, 0.7)


def _fisher(floor: float) -> Callable[..., Rule]:
    def make(generator: np.random.Generator, num_models: int, start: int) -> Rule:
        weights, floors = generator.random(num_models) * 3 + 0.1, generator.random(num_models) * floor
        return FisherMean(weights, floors, _weights(generator, num_models))

    return make


RULES: dict[str, Callable[..., Rule]] = {
    "weighted_sum": lambda generator, num_models, start: WeightedSum(_weights(generator, num_models)),
    "base_and_sum": lambda generator, num_models, start: WeightedSum(_weights(generator, num_models), -0.75),
    "fisher": _fisher(0.0),
    "fisher_floor": _fisher(0.2),
    "task_arithmetic": _consensus(False, False, 0.9),
    "task_mean": _consensus(False, True),
    "ties": _consensus(True, True, 0.8, among=Threshold(HALF, 500)),
    "ties_sum": _consensus(True, False, among=Threshold(HALF, 20_000)),
    "breadcrumbs": _consensus(False, False, among=Threshold(HALF, 5), outside=Threshold(0x3FC00000, 900)),
    "dare": _consensus(False, False, probability=0.4, rescale=2.5),
    "dare_ties": _consensus(True, True, probability=0.7, rescale=1 / 0.7),
    "ties_at_random": _consensus(
        True, True, among=Threshold(HALF, 5), outside=Threshold(0x3FC00000, 900), probability=0.6, rescale=1.5
    ),
    "zeros_up_to": _consensus(False, False, 2.0, among=Threshold(0, 100)),
    "keep_everything": _consensus(True, False, among=Threshold(0, 1 << 40), probability=1.0),
    "keep_nothing": _consensus(False, True, among=Threshold(0xFFFFFFFF, -1)),
    "drop_everything": _consensus(False, False, probability=0.0, rescale=3.0),
    "signed_weights": _signed_weights,
    "near_swap": lambda generator, num_models, start: NearSwap(0.05),
}
NEEDS_FISHER = ("fisher", "fisher_floor")
NEEDS_NO_BASE = ("weighted_sum", "fisher", "fisher_floor")


def piece(
    rule_name: str,
    num_models: int,
    size: int,
    dtypes: Sequence[str],
    out_dtype: str,
    *,
    seed: int = 0,
    start: int = 0,
    layouts: Sequence[str] = ("torch",),
) -> Piece:
    """A rule over random inputs; dtypes and layouts take turns among the spans."""
    generator = np.random.default_rng([seed, num_models, size, start])
    turn = iter(range(1 << 30))

    def next_span(values: np.ndarray) -> Span:
        number = next(turn)
        return span(values, dtypes[number % len(dtypes)], layouts[(number + seed) % len(layouts)])

    theta = tuple(next_span(parameters(generator, size)) for _ in range(num_models))
    base = None if rule_name in NEEDS_NO_BASE else next_span(parameters(generator, size))
    fisher: tuple[Span, ...] = ()
    if rule_name in NEEDS_FISHER:
        fisher = tuple(next_span(values) for values in fishers(generator, num_models, size))
    rule = RULES[rule_name](generator, num_models, start)
    out = empty(size, out_dtype, layouts[seed % len(layouts)])
    return Piece(Inputs(theta, base, fisher, start), rule, out)


def with_out(original: Piece, out: Span | None = None) -> Piece:
    """The same work with another output: a fresh one like the first, or ``out``."""
    return replace(original, out=out or empty(original.out.size, original.out.dtype, "torch"))


def assert_same(results: Sequence[Piece], expected: Sequence[Piece]) -> None:
    """Every output has the bits that it should have."""
    for result, wanted in zip(results, expected, strict=True):
        different = np.flatnonzero(bits(result.out) != bits(wanted.out))
        if len(different):
            i = different[0]
            got, right = reference.read(result.out)[i], reference.read(wanted.out)[i]
            dtypes = [s.dtype for s in result.inputs.theta]
            raise AssertionError(
                f"{type(result.rule).__name__}, {result.out.size} elements, {dtypes} to {result.out.dtype}: "
                f"{len(different)} differ, first at {i}: {got!r} instead of {right!r}"
            )


def assert_inputs_are_only_read(backend: Backend, dtype: str) -> None:
    """No call changes what it is given to read."""
    for rule_name in RULES:
        one = piece(rule_name, 1 if rule_name == "near_swap" else 3, 2 * BLOCK + 5, (dtype,), dtype)
        inputs = one.inputs
        spans = [*inputs.theta, *inputs.fisher, *([] if inputs.base is None else [inputs.base])]
        before = [bits(each) for each in spans]
        backend.apply([one])
        backend.gram(inputs)
        backend.histogram(inputs, None)
        backend.histogram(inputs, [0x3F00] * len(inputs.theta))
        backend.sift(inputs, [(0, HALF)] * len(inputs.theta), 100)
        backend.nth_equal(inputs, 0, HALF, 1)
        backend.non_finite(inputs)
        backend.add_squares(span(np.zeros(inputs.size)), inputs.theta[0], 0.5)
        assert all(np.array_equal(bits(each), old) for each, old in zip(spans, before, strict=True)), (
            rule_name
        )


def assert_cancelled_weights_divide_by_one(backend: Backend, elect: bool) -> None:
    weights = np.array([0.1, 0.2, -0.3])
    assert 0 < abs(weights.sum()) < 1e-16
    theta = tuple(span(np.array([delta, 0.0]), "float64") for delta in (1.0, 2.0, -3.0))
    out = empty(2, "float64", "torch")
    keep = (Keep(), Keep(), Keep())
    rule = Consensus(weights, keep, elect=elect, normalize=True, scale=1.0)
    backend.apply([Piece(Inputs(theta, span(np.zeros(2), "float64")), rule, out)])
    assert np.allclose(reference.read(out), [0.1 + 0.4 + 0.9, 0.0], rtol=1e-15, atol=0)
