"""Sums of products and counts, compiled."""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    BLOCK,
    FLOAT64_BLOCK,
    FLOAT64_STRIP,
    STRIP,
    as_float64,
    inlined,
    item_size,
    load_float64,
    load_int64,
    pointer,
    scratch,
    shared,
    store_float64,
)

# --- sums of products


@inlined
def _product(x, y, i):
    return load_float64(x, i) * load_float64(y, i)


@inlined
def _four_products(x, y, i):
    """Four of the sixteen products that are 64 apart, added as the halving of a block adds them."""
    near = _product(x, y, i) + _product(x, y, i + 512)
    return near + (_product(x, y, i + 256) + _product(x, y, i + 768))


@inlined
def _halve(sums, half):
    for i in range(half):
        store_float64(sums, i, load_float64(sums, i) + load_float64(sums, i + half))


@inlined
def _pair(sums, i):
    return load_float64(sums, i) + load_float64(sums, i + 4)


@shared
def _block_sum(x, y, sums):
    """The tree sum of x * y over a block. The first four of its ten levels stay in registers."""
    for i in range(64):
        even = _four_products(x, y, i) + _four_products(x, y, i + 128)
        odd = _four_products(x, y, i + 64) + _four_products(x, y, i + 192)
        store_float64(sums, i, even + odd)
    _halve(sums, 32)
    _halve(sums, 16)
    _halve(sums, 8)
    a, b = _pair(sums, 0) + _pair(sums, 2), _pair(sums, 1) + _pair(sums, 3)
    return a + b


def gram(spans, bases, num_models, work, out, size):
    """``work``: room for K + 1 blocks of FLOAT64_BLOCK bytes. ``out``: [64, K * (K + 1) / 2] float64.

    Row 0 of ``out`` becomes the sums of the pairs (0, 0), (0, 1), ..., (1, 1), ...; before, row l holds the sums of 2^l
    blocks that wait for a neighbour.
    """
    sums = scratch(512)
    base = pointer(work, FLOAT64_BLOCK * num_models)
    base_address, base_code = load_int64(bases, 0), load_int64(bases, 1)
    num_pairs = num_models * (num_models + 1) // 2
    num_blocks = (size + BLOCK - 1) // BLOCK
    for block in range(num_blocks):
        start = block * BLOCK
        n = min(BLOCK, size - start)
        if base_address != 0:
            as_float64(base_code, pointer(base_address, start * item_size(base_code)), n, base)
        for k in range(num_models):
            strip = pointer(work, FLOAT64_BLOCK * k)
            code = load_int64(spans, num_models + k)
            as_float64(code, pointer(load_int64(spans, k), start * item_size(code)), n, strip)
            if base_address != 0:
                for i in range(n):
                    store_float64(strip, i, load_float64(strip, i) - load_float64(base, i))
            for i in range(n, BLOCK):
                store_float64(strip, i, 0.0)
        pair = 0
        for k in range(num_models):
            for j in range(k, num_models):
                total = _block_sum(pointer(work, FLOAT64_BLOCK * k), pointer(work, FLOAT64_BLOCK * j), sums)
                level = 0
                while (block >> level) & 1:
                    total = load_float64(out, level * num_pairs + pair) + total
                    level += 1
                store_float64(out, level * num_pairs + pair, total)
                pair += 1
    for pair in range(num_pairs):
        total = 0.0
        level = 0
        while (1 << level) < num_blocks or (num_blocks >> level) & 1:
            if (num_blocks >> level) & 1:
                here = load_float64(out, level * num_pairs + pair)
                total = here if (1 << level) == num_blocks else here + total
            else:
                total = 0.0 + total
            level += 1
        store_float64(out, pair, total)
    return np.int64(0)


def non_finite(address, code, size):
    """How many elements are NaN or infinite."""
    numbers = scratch(FLOAT64_STRIP)
    total = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        as_float64(code, pointer(address, start * item_size(code)), n, numbers)
        here = 0
        for i in range(n):
            here += not abs(load_float64(numbers, i)) < np.inf
        total += here
    return total
