"""Sums of products, histograms of magnitudes and counts, compiled."""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    STRIP,
    inlined,
    item_size,
    load_float64,
    load_int64,
    load_uint32,
    magnitude_bits,
    read_strip,
    scratch,
    store_float64,
    store_int64,
    store_uint32,
)

FLOAT64_STRIP = 8 * STRIP
UINT32_STRIP = 4 * STRIP
BLOCK = 1024  # rules.BLOCK
NUM_UPPER, NUM_LOWER = 1 << 15, 1 << 16
GROUP = 32  # elements that are looked at together for one that matches


@inlined
def _read_delta(spans, num_models, k, base_spans, base, start, n, to):
    """theta_k, minus the strip ``base`` where there is one."""
    code = load_int64(spans, num_models + k)
    read_strip(code, load_int64(spans, k) + start * item_size(code), n, to)
    if load_int64(base_spans, 0) != 0:
        for i in range(n):
            store_float64(to, i, load_float64(to, i) - load_float64(base, i))


@inlined
def _read_base(base_spans, start, n, base):
    if load_int64(base_spans, 0) != 0:
        code = load_int64(base_spans, 1)
        read_strip(code, load_int64(base_spans, 0) + start * item_size(code), n, base)


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
def _block_sum(x, y, sums):
    """The tree sum of x * y over a block. The first four of its ten levels stay in registers."""
    for i in range(64):
        even = _four_products(x, y, i) + _four_products(x, y, i + 128)
        odd = _four_products(x, y, i + 64) + _four_products(x, y, i + 192)
        store_float64(sums, i, even + odd)
    half = 32
    while half > 0:
        for i in range(half):
            store_float64(sums, i, load_float64(sums, i) + load_float64(sums, i + half))
        half //= 2
    return load_float64(sums, 0)


def gram(spans, base_spans, num_models, work, out, size):
    """``work``: room for (K + 1) * BLOCK float64. ``out``: [64, K * (K + 1) / 2] float64; row 0 becomes the sums of
    the pairs (0, 0), (0, 1), ..., (1, 1), ...; before, row l holds the sums of 2^l blocks that wait for a neighbour.
    """
    sums = scratch(512)
    base = work + 8 * BLOCK * num_models
    num_pairs = num_models * (num_models + 1) // 2
    num_blocks = (size + BLOCK - 1) // BLOCK
    for block in range(num_blocks):
        start = block * BLOCK
        n = min(BLOCK, size - start)
        _read_base(base_spans, start, n, base)
        for k in range(num_models):
            strip = work + 8 * BLOCK * k
            _read_delta(spans, num_models, k, base_spans, base, start, n, strip)
            for i in range(n, BLOCK):
                store_float64(strip, i, 0.0)
        pair = 0
        for k in range(num_models):
            for j in range(k, num_models):
                total = _block_sum(work + 8 * BLOCK * k, work + 8 * BLOCK * j, sums)
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


# --- magnitudes


@inlined
def _read_magnitudes(spans, num_models, k, base_spans, base, start, n, delta, bits):
    _read_delta(spans, num_models, k, base_spans, base, start, n, delta)
    for i in range(n):
        store_uint32(bits, i, magnitude_bits(load_float64(delta, i)))


@inlined
def _increment(counts, i):
    store_uint32(counts, i, np.uint32(load_uint32(counts, i) + np.uint32(1)))


def histogram_upper(spans, base_spans, num_models, counts, num_lanes, size):
    """``counts``: [K, num_lanes, NUM_UPPER] uint32. Neighbours that fall into one bin would wait for one another; they
    are counted in several lanes (1 or 4)."""
    base, delta, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
    lane = 4 * NUM_UPPER if num_lanes == 4 else 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        _read_base(base_spans, start, n, base)
        for k in range(num_models):
            row = counts + k * num_lanes * 4 * NUM_UPPER
            _read_magnitudes(spans, num_models, k, base_spans, base, start, n, delta, bits)
            for quarter in range(n // 4):
                i = 4 * quarter
                _increment(row, load_uint32(bits, i) >> np.uint32(16))
                _increment(row + lane, load_uint32(bits, i + 1) >> np.uint32(16))
                _increment(row + 2 * lane, load_uint32(bits, i + 2) >> np.uint32(16))
                _increment(row + 3 * lane, load_uint32(bits, i + 3) >> np.uint32(16))
            for i in range(n // 4 * 4, n):
                _increment(row, load_uint32(bits, i) >> np.uint32(16))
    return np.int64(0)


@inlined
def _num_with_prefix(bits, start, n, prefix):
    number = np.uint32(0)
    for i in range(start, start + n):
        number = np.uint32(number + np.uint32((load_uint32(bits, i) >> np.uint32(16)) == prefix))
    return number


def histogram_lower(spans, base_spans, num_models, prefixes, counts, num_lanes, size):
    """``counts``: [K, num_lanes, NUM_LOWER] uint32; ``prefixes``: [K] int64."""
    base, delta, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        _read_base(base_spans, start, n, base)
        for k in range(num_models):
            row = counts + k * num_lanes * 4 * NUM_LOWER
            prefix = np.uint32(load_int64(prefixes, k))
            _read_magnitudes(spans, num_models, k, base_spans, base, start, n, delta, bits)
            for group in range(0, n, GROUP):
                many = min(GROUP, n - group)
                if _num_with_prefix(bits, group, many, prefix) == np.uint32(0):
                    continue
                for i in range(group, group + many):
                    if (load_uint32(bits, i) >> np.uint32(16)) == prefix:
                        lane = (i & (num_lanes - 1)) * 4 * NUM_LOWER
                        _increment(row + lane, load_uint32(bits, i) & np.uint32(0xFFFF))
    return np.int64(0)


def equal_positions(spans, base_spans, wanted, positions, size):
    """Count the elements of the one model in ``spans`` whose magnitude has the bits ``wanted``; write their indices to
    ``positions`` (int64) unless that is 0."""
    base, delta, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
    target = np.uint32(wanted)
    number = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        _read_base(base_spans, start, n, base)
        _read_magnitudes(spans, 1, 0, base_spans, base, start, n, delta, bits)
        here = np.uint32(0)
        for i in range(n):
            here = np.uint32(here + np.uint32(load_uint32(bits, i) == target))
        if positions != 0 and here > np.uint32(0):
            place = number
            for i in range(n):
                if load_uint32(bits, i) == target:
                    store_int64(positions, place, start + i)
                    place += 1
        number += here
    return number


def non_finite(address, code, size):
    """How many elements are NaN or infinite."""
    numbers = scratch(FLOAT64_STRIP)
    total = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        read_strip(code, address + start * item_size(code), n, numbers)
        here = 0
        for i in range(n):
            here += not abs(load_float64(numbers, i)) < np.inf
        total += here
    return total
