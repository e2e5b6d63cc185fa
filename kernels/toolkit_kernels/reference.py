"""Every rule as a few lines of float64: the definition that the fast backends are held to, bit for bit.

Whole pieces at once in numpy, element by element in the order of the formulas; nothing is blocked, fused or reused.

Legend: K models, N elements; theta_KN, fisher_KN, delta_KN, keep_KN, base_N, out_N.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels import philox
from toolkit_kernels.rules import (
    BLOCK,
    Consensus,
    FisherMean,
    Floats,
    Inputs,
    Keep,
    NearSwap,
    Pieces,
    Rule,
    Threshold,
    WeightedSum,
)
from toolkit_kernels.spans import CARRIERS, Span

Bits = NDArray[np.uint32]
Mask = NDArray[np.bool_]

# Of each dtype: the bits of its significand, the exponent e of its smallest normal number 2**(e - 1), and the power of
# two at which it overflows.
FORMATS = {"float16": (11, -13, 16), "bfloat16": (8, -125, 128), "float32": (24, -125, 128)}


def read(span: Span) -> Floats:
    """[N] the elements in float64, which holds each of them exactly."""
    carried = _carried(span)
    if span.dtype == "bfloat16":
        carried = (carried.astype(np.uint32) << 16).view(np.float32)
    return carried.astype(np.float64)


def write(span: Span, out_N: Floats) -> None:
    """Round to float32 and from there to the dtype of ``span``, each to nearest even; float64 stays as it is."""
    rounded = rounded_twice(out_N, span.dtype)
    if span.dtype == "bfloat16":
        rounded = (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if isinstance(span.data, np.ndarray):
        span.data[:] = rounded.astype(CARRIERS[span.dtype])
    else:
        span.data.copy_(_as_tensor(rounded.astype(CARRIERS[span.dtype]), span.dtype))


def rounded_twice(values_N: Floats, dtype: str) -> Floats:
    """What backends store: float64 rounded to float32 and then to ``dtype``, as float64."""
    if dtype == "float64":
        return values_N
    return rounded_once(rounded_once(values_N, "float32"), dtype)


def rounded_once(values_N: Floats, dtype: str) -> Floats:
    """float64 rounded exactly once, to the nearest number of ``dtype`` and to the even one of two, as float64.

    quantum = 2**(max(exponent, smallest exponent) - significand); out = quantum * rint(values / quantum). Dividing and
    multiplying by a power of two is exact, so ``rint`` is the only rounding.
    """
    significand, smallest, overflow = FORMATS[dtype]
    with np.errstate(all="ignore"):
        exponent = np.frexp(values_N)[1]  # |value| lies in [2**(exponent - 1), 2**exponent)
        quantum = np.ldexp(1.0, np.maximum(exponent, smallest) - significand)
        rounded = np.rint(values_N / quantum) * quantum
        too_large = np.abs(rounded) >= 2.0**overflow
        return np.where(too_large, np.copysign(np.inf, rounded), rounded)


def ulp_of(values_N: Floats, dtype: str) -> Floats:
    """[N] the distance between neighbours of ``dtype`` around each value: 2**(exponent - significand)."""
    significand, smallest, _ = FORMATS[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(values_N)[1], smallest) - significand)


def weighted_sum(rule: WeightedSum, theta_KN: Sequence[Floats], base_N: Floats | None) -> Floats:
    """out = base_weight * theta_0 + sum_k weights_k * theta_k, from left to right."""
    terms = [w * theta_N for w, theta_N in zip(rule.weights, theta_KN, strict=True)]
    if rule.base_weight is not None:
        terms = [rule.base_weight * _needed(base_N), *terms]
    return _in_order(terms)


def fisher_mean(rule: FisherMean, theta_KN: Sequence[Floats], fisher_KN: Sequence[Floats]) -> Floats:
    """out = sum_k (w_k f_k) theta_k / sum_k (w_k f_k), f_k = max(F_k, floor_k); plain weights where that is 0 / 0.

    Source: Matena & Raffel 2022, arXiv:2111.09832, eq. 4.
    """
    floored_KN = [np.maximum(F_N, floor) for F_N, floor in zip(fisher_KN, rule.floors, strict=True)]
    weighted_KN = [w * f_N for w, f_N in zip(rule.weights, floored_KN, strict=True)]
    numerator_N = _in_order([wf_N * theta_N for wf_N, theta_N in zip(weighted_KN, theta_KN, strict=True)])
    denominator_N = _in_order(weighted_KN)
    fallback_N = _in_order([w * theta_N for w, theta_N in zip(rule.fallback, theta_KN, strict=True)])
    return np.where(denominator_N == 0, fallback_N, numerator_N / denominator_N)


def consensus(rule: Consensus, theta_KN: Sequence[Floats], base_N: Floats | None, start: int) -> Floats:
    """out = theta_0 + scale * m; m sums or averages v_k = weights_k * (rescale_k * delta_k), of one sign if elected.

    Sources: task arithmetic, Ilharco et al. 2023, arXiv:2212.04089; TIES, Yadav et al. 2023, arXiv:2306.01708;
    DARE, Yu et al. 2024, arXiv:2311.03099.
    """
    base_N = _needed(base_N)
    v_KN = []
    for weight, keep, theta_N in zip(rule.weights, rule.keep, theta_KN, strict=True):
        delta_N = theta_N - base_N
        v_KN.append(np.where(kept(keep, delta_N, start), weight * (keep.rescale * delta_N), 0.0))
    zero_N = np.zeros_like(base_N)
    total_N = _in_order([zero_N, *v_KN])
    counted_KN = [np.ones_like(base_N, dtype=bool)] * len(v_KN)
    if rule.elect:
        sign_N = np.where(total_N >= 0, 1.0, -1.0)
        counted_KN = [np.sign(v_N) == sign_N for v_N in v_KN]
        total_N = _in_order([zero_N, *(np.where(c, v, 0.0) for c, v in zip(counted_KN, v_KN, strict=True))])
    if rule.normalize:
        weights_KN = [np.where(c, w, 0.0) for c, w in zip(counted_KN, rule.weights, strict=True)]
        divisor_N = _in_order([zero_N, *weights_KN])
        total_N = total_N / np.where(np.abs(divisor_N) <= rule.negligible, 1.0, divisor_N)
    return base_N + rule.scale * total_N


def near_swap(rule: NearSwap, theta_N: Floats, base_N: Floats | None) -> Floats:
    """out = theta_0 + w * (theta_1 - theta_0), w = min(1, t / |theta_1 - theta_0|), 1 where they are equal.

    theta_0 is the base of the inputs and theta_1 their only model.
    """
    base_N = _needed(base_N)
    delta_N = theta_N - base_N
    w_N = np.where(delta_N == 0, 1.0, np.minimum(1.0, rule.t / np.abs(delta_N)))
    return base_N + w_N * delta_N


def magnitude_bits(delta_N: Floats) -> Bits:
    """[N] bit patterns of |delta| rounded to float32; as unsigned integers they have the order of the magnitudes."""
    with np.errstate(all="ignore"):
        return np.abs(delta_N.astype(np.float32)).view(np.uint32)


def kept(keep: Keep, delta_N: Floats, start: int) -> Mask:
    """[N] which elements of a delta stay, the first of them being element ``start`` of the tensor."""
    mask_N = np.ones(len(delta_N), dtype=bool)
    if keep.among is not None:
        mask_N &= _is_among(keep.among, delta_N, start)
    if keep.outside is not None:
        mask_N &= ~_is_among(keep.outside, delta_N, start)
    if keep.probability is not None:
        words_N = philox.random_words(keep.key, keep.stream, start, len(delta_N))
        mask_N &= words_N < np.uint64(np.floor(keep.probability * 2.0**32))
    return mask_N


def _is_among(threshold: Threshold, delta_N: Floats, start: int) -> Mask:
    bits_N = magnitude_bits(delta_N)
    index_N = np.arange(start, start + len(delta_N))
    return (bits_N > threshold.bits) | ((bits_N == threshold.bits) & (index_N <= threshold.last))


class ReferenceBackend:
    """The contract of ``backend.Backend``, by the formulas."""

    name = "reference"

    def apply(self, pieces: Pieces) -> NDArray[np.int64]:
        counts = []
        for piece in pieces:
            with np.errstate(all="ignore"):
                write(piece.out, _apply_rule(piece.rule, piece.inputs))
                counts.append(np.count_nonzero(~np.isfinite(read(piece.out))))
        return np.array(counts, dtype=np.int64)

    def gram(self, inputs: Inputs) -> Floats:
        delta_KN = _deltas(inputs)
        num_blocks = 1 << max(-(-inputs.size // BLOCK) - 1, 0).bit_length()
        padded_KN = np.zeros((len(delta_KN), num_blocks * BLOCK))
        padded_KN[:, : inputs.size] = delta_KN
        result = np.empty((len(delta_KN), len(delta_KN)))
        with np.errstate(all="ignore"):
            for i, row_N in enumerate(padded_KN):
                result[i] = [_tree_sum(row_N * column_N) for column_N in padded_KN]
        return result

    def histogram(self, inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
        bits_KN = [magnitude_bits(delta_N) for delta_N in _deltas(inputs)]
        if prefixes is None:
            return np.stack([np.bincount(bits_N >> 16, minlength=1 << 15) for bits_N in bits_KN])
        chosen = [bits_N[bits_N >> 16 == p] & 0xFFFF for bits_N, p in zip(bits_KN, prefixes, strict=True)]
        return np.stack([np.bincount(bits_M, minlength=1 << 16) for bits_M in chosen])

    def sift(
        self, inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
    ) -> tuple[NDArray[np.int64], list[Bits]]:
        counts, found = [], []
        for delta_N, (low, high) in zip(_deltas(inputs), bounds, strict=True):
            bits_N = magnitude_bits(delta_N)
            masks = (bits_N > high, bits_N >= high, bits_N > low, bits_N >= low)
            counts.append([np.count_nonzero(mask_N) for mask_N in masks])
            found.append(bits_N[(bits_N > low) & (bits_N < high)][:room])
        return np.array(counts, np.int64), found

    def nth_equal(self, inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
        positions = np.flatnonzero(magnitude_bits(_deltas(inputs)[model]) == bits)[:number]
        return len(positions), int(positions[-1]) if len(positions) == number else -1

    def non_finite(self, inputs: Inputs) -> NDArray[np.int64]:
        spans = [*inputs.theta, *([] if inputs.base is None else [inputs.base])]
        return np.array([np.count_nonzero(~np.isfinite(read(span))) for span in spans], dtype=np.int64)

    def add_squares(self, total: Span, values: Span, scale: float = 1.0) -> None:
        values_N = read(values)
        with np.errstate(all="ignore"):
            write(total, read(total) + (scale * values_N) * values_N)


def make() -> ReferenceBackend:
    return ReferenceBackend()


def _apply_rule(rule: Rule, inputs: Inputs) -> Floats:
    theta_KN = [read(span) for span in inputs.theta]
    base_N = None if inputs.base is None else read(inputs.base)
    if isinstance(rule, WeightedSum):
        return weighted_sum(rule, theta_KN, base_N)
    if isinstance(rule, FisherMean):
        return fisher_mean(rule, theta_KN, [read(span) for span in inputs.fisher])
    if isinstance(rule, Consensus):
        return consensus(rule, theta_KN, base_N, inputs.start)
    (theta_N,) = theta_KN
    return near_swap(rule, theta_N, base_N)


def _deltas(inputs: Inputs) -> list[Floats]:
    base_N = 0.0 if inputs.base is None else read(inputs.base)
    with np.errstate(all="ignore"):
        return [read(span) - base_N for span in inputs.theta]


def _in_order(terms: Sequence[Floats]) -> Floats:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _tree_sum(products_N: Floats) -> float:
    """By halves within blocks, then blocks as neighbours; N is BLOCK times a power of two."""
    blocks = products_N.reshape(-1, BLOCK)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    sums = blocks[:, 0]
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return float(sums[0])


def _needed(base_N: Floats | None) -> Floats:
    if base_N is None:
        raise ValueError("this rule needs a base")
    return base_N


def _carried(span: Span) -> NDArray[Any]:
    """The memory of a span as numpy sees it: bfloat16 as uint16; from another device, a copy."""
    if isinstance(span.data, np.ndarray):
        return span.data
    import torch  # spans of numpy need none

    data = span.data.detach().cpu()
    return (data.view(torch.uint16) if span.dtype == "bfloat16" else data).numpy()


def _as_tensor(carried: NDArray[Any], dtype: str) -> Any:
    import torch  # spans of numpy need none

    tensor = torch.from_numpy(carried)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
