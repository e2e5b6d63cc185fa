"""Sums of products, histograms of magnitudes and counts, compiled."""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    BLOCK,
    FLOAT64_BLOCK,
    FLOAT64_STRIP,
    STRIP,
    UINT32_STRIP,
    as_float32,
    as_float64,
    difference32,
    difference64,
    inlined,
    item_size,
    load_float64,
    load_int64,
    load_uint32,
    magnitude_bits,
    pointer,
    scratch,
    shared,
    store_float64,
    store_int64,
    store_uint32,
)

NUM_UPPER, NUM_LOWER = 1 << 15, 1 << 16
GROUP = 32  # elements that are looked at together for one that matches


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


# --- magnitudes


@inlined
def _increment(counts, i):
    store_uint32(counts, i, np.uint32(load_uint32(counts, i) + np.uint32(1)))


@shared
def _count_upper(bits, n, counts, lane):
    """Neighbours that fall into one bin would wait for one another: each of four counts in its lane."""
    for quarter in range(n // 4):
        i = 4 * quarter
        _increment(counts, load_uint32(bits, i) >> np.uint32(16))
        _increment(pointer(counts, lane), load_uint32(bits, i + 1) >> np.uint32(16))
        _increment(pointer(counts, 2 * lane), load_uint32(bits, i + 2) >> np.uint32(16))
        _increment(pointer(counts, 3 * lane), load_uint32(bits, i + 3) >> np.uint32(16))
    for i in range(n // 4 * 4, n):
        _increment(counts, load_uint32(bits, i) >> np.uint32(16))


@inlined
def _num_with_prefix(bits, start, n, prefix):
    number = np.uint32(0)
    for i in range(start, start + n):
        number = np.uint32(number + np.uint32((load_uint32(bits, i) >> np.uint32(16)) == prefix))
    return number


@shared
def _count_lower(bits, n, prefix, counts, num_lanes):
    for group in range(0, n, GROUP):
        many = min(GROUP, n - group)
        if _num_with_prefix(bits, group, many, prefix) == np.uint32(0):
            continue
        for i in range(group, group + many):
            if (load_uint32(bits, i) >> np.uint32(16)) == prefix:
                lane = (i & (num_lanes - 1)) * 4 * NUM_LOWER
                _increment(pointer(counts, lane), load_uint32(bits, i) & np.uint32(0xFFFF))


def _magnitude_reader(as_lane, difference):
    @inlined
    def read_base(bases, start, n, buffer):
        """The strip of theta_0; zeros where there is no base."""
        address, code = load_int64(bases, 0), load_int64(bases, 1)
        if address != 0:
            return as_lane(code, pointer(address, start * item_size(code)), n, buffer)
        for i in range(n):
            store_float64(buffer, i, 0.0)
        return buffer

    @shared
    def read_magnitudes(spans, num_models, k, base, start, n, buffer, bits):
        """Bit patterns of |theta_k - base| as float32."""
        code = load_int64(spans, num_models + k)
        theta = as_lane(code, pointer(load_int64(spans, k), start * item_size(code)), n, buffer)
        for i in range(n):
            store_uint32(bits, i, magnitude_bits(difference(theta, base, i)))

    return read_base, read_magnitudes


def _histogram_upper(read_base, read_magnitudes):
    def histogram_upper(spans, bases, num_models, counts, num_lanes, size):
        """``counts``: [K, num_lanes, NUM_UPPER] uint32; 1 or 4 lanes."""
        base_buffer, buffer, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
        lane = 4 * NUM_UPPER if num_lanes == 4 else 0
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            base = read_base(bases, start, n, base_buffer)
            for k in range(num_models):
                read_magnitudes(spans, num_models, k, base, start, n, buffer, bits)
                _count_upper(bits, n, pointer(counts, k * num_lanes * 4 * NUM_UPPER), lane)
        return np.int64(0)

    return histogram_upper


def _histogram_lower(read_base, read_magnitudes):
    def histogram_lower(spans, bases, num_models, prefixes, counts, num_lanes, size):
        """``counts``: [K, num_lanes, NUM_LOWER] uint32; ``prefixes``: [K] int64."""
        base_buffer, buffer, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            base = read_base(bases, start, n, base_buffer)
            for k in range(num_models):
                read_magnitudes(spans, num_models, k, base, start, n, buffer, bits)
                prefix = np.uint32(load_int64(prefixes, k))
                _count_lower(bits, n, prefix, pointer(counts, k * num_lanes * 4 * NUM_LOWER), num_lanes)
        return np.int64(0)

    return histogram_lower


def _equal_positions(read_base, read_magnitudes):
    def equal_positions(spans, bases, wanted, positions, size):
        """Count the elements of the one model in ``spans`` whose magnitude has the bits ``wanted``; write their indices
        to ``positions`` (int64) unless that is 0."""
        base_buffer, buffer, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
        target = np.uint32(wanted)
        number = 0
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            base = read_base(bases, start, n, base_buffer)
            read_magnitudes(spans, 1, 0, base, start, n, buffer, bits)
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

    return equal_positions


_NARROW, _WIDE = _magnitude_reader(as_float32, difference32), _magnitude_reader(as_float64, difference64)
histogram_upper, histogram_upper_wide = _histogram_upper(*_NARROW), _histogram_upper(*_WIDE)
histogram_lower, histogram_lower_wide = _histogram_lower(*_NARROW), _histogram_lower(*_WIDE)
equal_positions, equal_positions_wide = _equal_positions(*_NARROW), _equal_positions(*_WIDE)


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
