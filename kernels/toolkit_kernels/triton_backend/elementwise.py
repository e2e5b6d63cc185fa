"""Device code of the elementwise rules: one launch computes a whole state dict.

Formulas and their order are those of rules.py; tests compare the bits with the reference.

Arguments that the functions share:
    row: pointer to int64, the tensor's row (rows.py). The container must be of shape
        [HEAD_COLUMNS + K * MODEL_COLUMNS].
    k: which model.
    offsets: int64 [block], which elements of the tensor.
    size: number of elements of the tensor.
    variant: rows.Variant.
    masked: some offsets may lie beyond size.
"""

# Triton compiles this; to Python's type checker its constants, blocks and loops are something else than what they are.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from toolkit_kernels.triton_backend.numbers import load, load_any, magnitude_bits, random_words, store
from toolkit_kernels.triton_backend.rows import (
    AMONG,
    BASE,
    FALLBACK,
    FISHER,
    FLOOR,
    HEAD_COLUMNS,
    KEY,
    LIMIT,
    MODEL_COLUMNS,
    NEGLIGIBLE,
    OUT,
    OUTSIDE,
    PIECE,
    RESCALE,
    SCALAR,
    SIZE,
    START,
    STREAM,
    THETA,
    WEIGHT,
)


@triton.jit
def integer(row, k, column):
    """A column of model k as int64."""
    return tl.load(row + HEAD_COLUMNS + k * MODEL_COLUMNS + column)


@triton.jit
def number(row, k, column):
    """A column of model k as float64."""
    return integer(row, k, column).to(tl.float64, bitcast=True)


@triton.jit
def load_theta(row, k, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """theta_k as float64."""
    address = integer(row, k, THETA)
    if variant.unrolled:
        dtype: tl.constexpr = variant.theta[k]
        theta = load(address, offsets, size, dtype, variant.aligned, masked)
    else:
        theta = load_any(address, integer(row, k, THETA + 1), offsets, size, variant.aligned, masked)
    return theta


@triton.jit
def load_fisher(row, k, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """f_k = max(F_k, floor_k) as float64."""
    address = integer(row, k, FISHER)
    if variant.unrolled:
        dtype: tl.constexpr = variant.fisher[k]
        fisher = load(address, offsets, size, dtype, variant.aligned, masked)
    else:
        fisher = load_any(address, integer(row, k, FISHER + 1), offsets, size, variant.aligned, masked)
    floor = number(row, k, FLOOR)
    return tl.where(fisher < floor, floor, fisher)


@triton.jit
def load_base(row, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """theta_0 as float64."""
    dtype: tl.constexpr = variant.base
    return load(tl.load(row + BASE), offsets, size, dtype, variant.aligned, masked)


@triton.jit
def negative_zeros(variant: tl.constexpr):
    """Where a sum without a first term starts: x + -0.0 is x, also for -0.0. (tl.full would drop the sign.)"""
    return tl.full((variant.block,), -0x8000000000000000, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def add_weighted(total, row, column, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """total + sum_k weights_k * theta_k; the weights stand in ``column``."""
    num_models: tl.constexpr = variant.num_models
    if variant.unrolled:
        for k in tl.static_range(num_models):
            total += number(row, k, column) * load_theta(row, k, offsets, size, variant, masked)
    else:
        for k in range(num_models):
            total += number(row, k, column) * load_theta(row, k, offsets, size, variant, masked)
    return total


@triton.jit
def weighted_sum(row, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """rules.WeightedSum."""
    total = negative_zeros(variant)
    if variant.base is not None:
        weight = tl.load(row + SCALAR).to(tl.float64, bitcast=True)
        total = weight * load_base(row, offsets, size, variant, masked)
    return add_weighted(total, row, WEIGHT, offsets, size, variant, masked)


@triton.jit
def add_fisher(numerator, denominator, row, k, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """Both sums of rules.FisherMean with the terms of model k."""
    weighted = number(row, k, WEIGHT) * load_fisher(row, k, offsets, size, variant, masked)
    theta = load_theta(row, k, offsets, size, variant, masked)
    return numerator + weighted * theta, denominator + weighted


@triton.jit
def fisher_mean(row, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """rules.FisherMean; only a block that needs the fallback reads its elements again for it."""
    numerator = negative_zeros(variant)
    denominator = negative_zeros(variant)
    num_models: tl.constexpr = variant.num_models
    if variant.unrolled:
        for k in tl.static_range(num_models):
            numerator, denominator = add_fisher(
                numerator, denominator, row, k, offsets, size, variant, masked
            )
    else:
        for k in range(num_models):
            numerator, denominator = add_fisher(
                numerator, denominator, row, k, offsets, size, variant, masked
            )
    result = numerator / denominator
    if tl.max((denominator == 0).to(tl.int32), axis=0) > 0:
        fallback = add_weighted(negative_zeros(variant), row, FALLBACK, offsets, size, variant, masked)
        result = tl.where(denominator == 0, fallback, result)
    return result


@triton.jit
def is_among(bits, index, row, k, column):
    """Which elements belong to the set of largest ones whose rules.Threshold stands in ``column`` and the next."""
    threshold = integer(row, k, column)
    last = integer(row, k, column + 1)
    return (bits > threshold) | ((bits == threshold) & (index <= last))


@triton.jit
def kept_value(base, row, k, first, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """v_k of rules.Consensus: weights_k * (rescale_k * delta_k), zero where rules.Keep drops it.

    first: int64, index in the whole tensor of the first of the offsets.
    """
    delta = load_theta(row, k, offsets, size, variant, masked) - base
    value = number(row, k, WEIGHT) * (number(row, k, RESCALE) * delta)
    if variant.trimmed:
        bits = magnitude_bits(delta)
        index = first + tl.arange(0, variant.block)
        value = tl.where(is_among(bits, index, row, k, AMONG), value, 0.0)
        value = tl.where(is_among(bits, index, row, k, OUTSIDE), 0.0, value)
    if variant.random:
        words = random_words(integer(row, k, KEY), integer(row, k, STREAM), first, variant.block)
        value = tl.where(words.to(tl.int64) < integer(row, k, LIMIT), value, 0.0)
    return value


@triton.jit
def add_value(sums, value, weight, variant: tl.constexpr):
    """The sums over all, over positive and over negative values, and of the weights of the latter two.

    Summing both signs at once spares a second pass: which of them is elected is known after the last model.
    """
    total, positive, negative, positive_weight, negative_weight = sums
    total += value
    if variant.elect:
        positive += tl.where(value > 0, value, 0.0)
        negative += tl.where(value < 0, value, 0.0)
        positive_weight += tl.where(value > 0, weight, 0.0)
        negative_weight += tl.where(value < 0, weight, 0.0)
    else:
        positive_weight += weight
    return total, positive, negative, positive_weight, negative_weight


@triton.jit
def consensus(row, start, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """rules.Consensus. start: int64, the first of the offsets."""
    base = load_base(row, offsets, size, variant, masked)
    first = tl.load(row + START) + start
    block: tl.constexpr = variant.block
    zero = tl.zeros((block,), tl.float64)
    sums = (zero, zero, zero, zero, zero)
    num_models: tl.constexpr = variant.num_models
    if variant.unrolled:
        for k in tl.static_range(num_models):
            value = kept_value(base, row, k, first, offsets, size, variant, masked)
            sums = add_value(sums, value, number(row, k, WEIGHT), variant)
    else:
        for k in range(num_models):
            value = kept_value(base, row, k, first, offsets, size, variant, masked)
            sums = add_value(sums, value, number(row, k, WEIGHT), variant)
    total, positive, negative, positive_weight, negative_weight = sums
    divisor = positive_weight
    if variant.elect:
        divisor = tl.where(total >= 0, positive_weight, negative_weight)
        total = tl.where(total >= 0, positive, negative)
    if variant.normalize:
        negligible = tl.load(row + NEGLIGIBLE).to(tl.float64, bitcast=True)
        total = total / tl.where(tl.abs(divisor) <= negligible, 1.0, divisor)
    return base + tl.load(row + SCALAR).to(tl.float64, bitcast=True) * total


@triton.jit
def near_swap(row, offsets, size, variant: tl.constexpr, masked: tl.constexpr):
    """rules.NearSwap."""
    base = load_base(row, offsets, size, variant, masked)
    delta = load_theta(row, 0, offsets, size, variant, masked) - base
    ratio = tl.load(row + SCALAR).to(tl.float64, bitcast=True) / tl.abs(delta)
    return base + tl.where(ratio < 1, ratio, 1.0) * delta


@triton.jit
def apply_to_block(row, start, size, variant: tl.constexpr, masked: tl.constexpr):
    """Compute and write the elements from ``start`` on; return how many of them are NaN or infinite."""
    offsets = start + tl.arange(0, variant.block)
    if variant.rule == "WeightedSum":
        result = weighted_sum(row, offsets, size, variant, masked)
    elif variant.rule == "FisherMean":
        result = fisher_mean(row, offsets, size, variant, masked)
    elif variant.rule == "Consensus":
        result = consensus(row, start, offsets, size, variant, masked)
    else:
        result = near_swap(row, offsets, size, variant, masked)
    out: tl.constexpr = variant.out
    bad = store(tl.load(row + OUT), offsets, size, result, out, variant.aligned, masked)
    if masked:
        bad = bad & (offsets < size)
    return tl.sum(bad.to(tl.int32), axis=0)


@triton.jit
def apply_kernel(rows, chunks, counts, variant: tl.constexpr):
    """One rule for T tensors of any sizes.

    Args:
        rows: pointer to int64, a row for each tensor. The container must be of shape
            [T, HEAD_COLUMNS + K * MODEL_COLUMNS].
        chunks: pointer to int32, for each program the index of a tensor and that of a block within it. The container
            must be of shape [programs, 2].
        counts: pointer to int64, to which the numbers of results that are NaN or infinite are added. The container must
            be of shape [pieces]; a row says which one is its tensor's.
        variant: rows.Variant.
    """
    # This program processes one block of one tensor: variant.block elements, fewer at the tensor's end.
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    row = rows + tl.load(entry).to(tl.int64) * (HEAD_COLUMNS + variant.num_models * MODEL_COLUMNS)
    start = tl.load(entry + 1).to(tl.int64) * variant.block
    size = tl.load(row + SIZE)
    if start + variant.block <= size:
        bad = apply_to_block(row, start, size, variant, False)
    else:
        bad = apply_to_block(row, start, size, variant, True)
    if bad > 0:
        tl.atomic_add(counts + tl.load(row + PIECE), bad.to(tl.int64), sem="relaxed")
