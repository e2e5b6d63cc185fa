"""Device code of the passes over one tensor: sums of products, histograms of magnitudes, what is not finite, squares.

Arguments that the functions share:
    row: pointer to int64, the tensor's row (rows.py). The container must be of shape
        [HEAD_COLUMNS + K * MODEL_COLUMNS].
    num_models: K.
    base: dtype of theta_0, or None where there is none. Those of the models stand in the row.
    aligned: every address is a multiple of 16.
    masked: some offsets may lie beyond size, the number of elements.
"""

# Triton compiles this; to Python's type checker its constants, blocks and loops are something else than what they are.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from toolkit_kernels.triton_backend.elementwise import integer
from toolkit_kernels.triton_backend.numbers import load, load_any, magnitude_bits, store
from toolkit_kernels.triton_backend.rows import BASE, SIZE, THETA

# The length of the blocks of Backend.gram (rules.BLOCK), and how often it can be halved.
GRAM_BLOCK = tl.constexpr(1024)
HALVINGS = tl.constexpr(10)


@triton.jit
def load_delta(row, k, base_values, offsets, size, aligned: tl.constexpr, masked: tl.constexpr):
    """theta_k - theta_0 as float64; base_values is theta_0, or zeros."""
    return (
        load_any(integer(row, k, THETA), integer(row, k, THETA + 1), offsets, size, aligned, masked)
        - base_values
    )


@triton.jit
def load_base_or_zeros(row, offsets, size, base: tl.constexpr, aligned: tl.constexpr, masked: tl.constexpr):
    if base is None:
        values = tl.zeros(offsets.shape, tl.float64)
    else:
        values = load(tl.load(row + BASE), offsets, size, base, aligned, masked)
    return values


@triton.jit
def sum_by_halves(products, num_rows: tl.constexpr):
    """x[: n / 2] + x[n / 2 :] again and again, from [num_rows, GRAM_BLOCK] to [num_rows]."""
    for level in tl.static_range(HALVINGS):
        products = tl.sum(tl.reshape(products, (num_rows, 2, GRAM_BLOCK >> (level + 1))), axis=1)
    return tl.reshape(products, (num_rows,))


@triton.jit
def gram_of_blocks(
    row,
    sums,
    num_models,
    num_blocks,
    block,
    size,
    base: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Write the sums of all pairs for the blocks number block, block + 1, ..."""
    blocks = block + tl.arange(0, num_rows)
    offsets = blocks[:, None] * GRAM_BLOCK + tl.arange(0, GRAM_BLOCK)[None, :]
    base_values = load_base_or_zeros(row, offsets, size, base, aligned, masked)
    place = sums + blocks
    for i in range(num_models):
        left = load_delta(row, i, base_values, offsets, size, aligned, masked)
        for j in range(i, num_models):
            right = load_delta(row, j, base_values, offsets, size, aligned, masked)
            tl.store(place, sum_by_halves(left * right, num_rows), mask=blocks < num_blocks)
            place += num_blocks


@triton.jit(do_not_specialize=["num_models", "num_blocks"])
def gram_kernel(
    row, sums, num_models, num_blocks, base: tl.constexpr, aligned: tl.constexpr, num_rows: tl.constexpr
):
    """Sums of products over blocks of GRAM_BLOCK elements, for each pair of models.

    Args:
        sums: pointer to float64, the results. The container must be of shape [K * (K + 1) / 2, num_blocks]; the pairs
            are (0, 0), (0, 1), ..., (0, K - 1), (1, 1), ...
        num_blocks: blocks that the tensor has, the last one filled up with zeros.
        num_rows: blocks that a program computes.
    """
    # This program processes num_rows blocks of every model.
    block = tl.program_id(0).to(tl.int64) * num_rows
    size = tl.load(row + SIZE)
    if (block + num_rows) * GRAM_BLOCK <= size:
        gram_of_blocks(row, sums, num_models, num_blocks, block, size, base, aligned, False, num_rows)
    else:
        gram_of_blocks(row, sums, num_models, num_blocks, block, size, base, aligned, True, num_rows)


@triton.jit
def histogram_of_block(
    row,
    counts,
    prefixes,
    num_models,
    start,
    size,
    base: tl.constexpr,
    lower: tl.constexpr,
    num_copies: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
    block: tl.constexpr,
):
    """Count the elements from start on; arguments as of histogram_kernel."""
    offsets = start + tl.arange(0, block)
    base_values = load_base_or_zeros(row, offsets, size, base, aligned, masked)
    num_bins: tl.constexpr = 65536 if lower else 32768
    copy = tl.program_id(0) % num_copies
    for k in range(num_models):
        bits = magnitude_bits(load_delta(row, k, base_values, offsets, size, aligned, masked))
        counted = offsets < size
        place = bits >> 16
        if lower:
            counted = counted & (place == tl.load(prefixes + k))
            place = bits & 0xFFFF
        model_counts = counts + (k * num_copies + copy) * num_bins
        # Every element of an unchanged tensor falls into the first bin: one addition for all of them.
        num_first = tl.sum((counted & (place == 0)).to(tl.int64), axis=0)
        if num_first > 0:
            tl.atomic_add(model_counts, num_first, sem="relaxed")
        ones = tl.full((block,), 1, tl.int64)
        tl.atomic_add(model_counts + place, ones, mask=counted & (place != 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_models"])
def histogram_kernel(
    row,
    counts,
    prefixes,
    num_models,
    base: tl.constexpr,
    lower: tl.constexpr,
    num_copies: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Count magnitudes by their bits: the upper 15, or the lower 16 of those with given upper ones.

    Args:
        counts: pointer to int64, to which the numbers are added. The container must be of shape
            [K, num_copies, 32768], or [K, num_copies, 65536] for the lower bits.
        prefixes: pointer to int32, the upper bits. The container must be of shape [K]; not read for the upper bits.
        lower: count the lower bits.
        num_copies: programs take turns with this many histograms, so that fewer wait for each other.
        block: elements that a program counts.
    """
    # This program processes one block of every model.
    start = tl.program_id(0).to(tl.int64) * block
    size = tl.load(row + SIZE)
    if start + block <= size:
        histogram_of_block(
            row, counts, prefixes, num_models, start, size, base, lower, num_copies, aligned, False, block
        )
    else:
        histogram_of_block(
            row, counts, prefixes, num_models, start, size, base, lower, num_copies, aligned, True, block
        )


@triton.jit
def count_non_finite(values, counts, k, offsets, size):
    """Add to counts[k] how many of the values are NaN or infinite."""
    bad = (tl.abs(values) < float("inf")) == 0
    num_bad = tl.sum((bad & (offsets < size)).to(tl.int64), axis=0)
    if num_bad > 0:
        tl.atomic_add(counts + k, num_bad, sem="relaxed")


@triton.jit
def non_finite_in_block(
    row,
    counts,
    num_models,
    start,
    size,
    base: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
    block: tl.constexpr,
):
    """Count in the elements from start on; arguments as of non_finite_kernel."""
    offsets = start + tl.arange(0, block)
    for k in range(num_models):
        values = load_delta(row, k, 0.0, offsets, size, aligned, masked)
        count_non_finite(values, counts, k, offsets, size)
    if base is not None:
        values = load_base_or_zeros(row, offsets, size, base, aligned, masked)
        count_non_finite(values, counts, num_models, offsets, size)


@triton.jit(do_not_specialize=["num_models"])
def non_finite_kernel(
    row, counts, num_models, base: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr
):
    """Count NaN and infinities.

    Args:
        counts: pointer to int64, to which the numbers are added. The container must be of shape [K + 1], the base last.
        block: elements that a program looks at.
    """
    # This program processes one block of every model.
    start = tl.program_id(0).to(tl.int64) * block
    size = tl.load(row + SIZE)
    if start + block <= size:
        non_finite_in_block(row, counts, num_models, start, size, base, aligned, False, block)
    else:
        non_finite_in_block(row, counts, num_models, start, size, base, aligned, True, block)


@triton.jit
def add_squares_of_block(
    total,
    values,
    start,
    size,
    scale,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
    block: tl.constexpr,
):
    """Add the squares of the elements from start on; arguments as of add_squares_kernel."""
    offsets = start + tl.arange(0, block)
    x = load(values, offsets, size, dtype, aligned, masked)
    result = load(total, offsets, size, "float32", aligned, masked) + (scale * x) * x
    store(total, offsets, size, result, "float32", aligned, masked)


@triton.jit(do_not_specialize=["total", "values", "size", "scale_bits"])
def add_squares_kernel(
    total, values, size, scale_bits, dtype: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr
):
    """total += (scale * values) * values.

    Args:
        total: address of the sums, float32. The container must be of shape [size].
        values: address of the values. The container must be of shape [size].
        scale_bits: the bits of a float64; a float would arrive as float32.
        dtype: of the values.
        block: elements that a program computes.
    """
    # This program processes one block.
    start = tl.program_id(0).to(tl.int64) * block
    total, values = total.to(tl.int64), values.to(tl.int64)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if start + block <= size:
        add_squares_of_block(total, values, start, size, scale, dtype, aligned, False, block)
    else:
        add_squares_of_block(total, values, start, size, scale, dtype, aligned, True, block)
