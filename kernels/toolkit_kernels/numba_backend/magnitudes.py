"""Magnitudes of deltas, compiled: histograms of their bit patterns, comparisons with bounds, places of equal ones."""

import numpy as np
from llvmlite import ir
from numba import types

from toolkit_kernels.numba_backend.bits import (
    BFLOAT16,
    FLOAT64_STRIP,
    STRIP,
    UINT32_STRIP,
    as_float32,
    as_float64,
    difference16,
    difference16_64,
    difference32,
    difference64,
    inlined,
    intrinsic,
    item_size,
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
GROUP = 64  # elements that are compared together; STRIP is a multiple
UNASKED = 4
NO_MAGNITUDE = np.uint32(0xFFFFFFFF)  # the sign is set


# --- elements


def _filler(difference):
    @inlined
    def fill(theta, base, n, bits):
        for i in range(n):
            store_uint32(bits, i, magnitude_bits(difference(theta, base, i)))

    return fill


def _reader(as_lane, fill_from_lane, fill_from_bfloat16):
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
        theta = pointer(load_int64(spans, k), start * item_size(code))
        if code == BFLOAT16:
            fill_from_bfloat16(theta, base, n, bits)
        else:
            fill_from_lane(as_lane(code, theta, n, buffer), base, n, bits)

    return read_base, read_magnitudes


@intrinsic
def _which_within(typing_context, bits, first, number):
    """One bit for each of GROUP magnitudes: whether it is one of the ``number`` bit patterns from ``first`` on."""

    def generate(context, builder, signature, arguments):
        place, *limits = arguments
        vector = ir.VectorType(ir.IntType(32), GROUP)
        values = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
        empty, nowhere = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        lanes = ir.Constant(vector, None)
        start, width = (
            builder.shuffle_vector(builder.insert_element(empty, limit, nowhere), empty, lanes)
            for limit in limits
        )
        within = builder.icmp_unsigned("<", builder.sub(values, start), width)
        return builder.bitcast(within, ir.IntType(GROUP))

    return types.uint64(bits, types.uint32, types.uint32), generate


@intrinsic
def _first_of(typing_context, which):
    """The lowest bit that is set; GROUP if none is."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def _number_of(typing_context, which):
    """How many bits are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


# --- histograms


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
def _end_group(bits, n):
    """What lies between the end of a strip and that of its last group is no magnitude."""
    for i in range(n, (n + GROUP - 1) // GROUP * GROUP):
        store_uint32(bits, i, NO_MAGNITUDE)


@shared
def _count_lower(bits, n, prefix, counts, num_lanes):
    first = np.uint32(prefix << np.uint32(16))
    for group in range(0, n, GROUP):
        which = _which_within(pointer(bits, 4 * group), first, np.uint32(NUM_LOWER))
        while which != np.uint64(0):
            i = group + _first_of(which)
            lane = (i & (num_lanes - 1)) * 4 * NUM_LOWER
            _increment(pointer(counts, lane), load_uint32(bits, i) & np.uint32(0xFFFF))
            which = np.uint64(which & np.uint64(which - np.uint64(1)))


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
                _end_group(bits, n)
                prefix = np.uint32(load_int64(prefixes, k))
                _count_lower(bits, n, prefix, pointer(counts, k * num_lanes * 4 * NUM_LOWER), num_lanes)
        return np.int64(0)

    return histogram_lower


# --- bounds


@shared
def _compare(bits, n, low, high, counts):
    """Add to ``counts`` how many are above the upper bound, at least the upper bound, -, at least the lower bound."""
    above, from_high, from_low = np.uint32(0), np.uint32(0), np.uint32(0)
    for i in range(n):
        pattern = load_uint32(bits, i)
        above = np.uint32(above + np.uint32(pattern > high))
        from_high = np.uint32(from_high + np.uint32(pattern >= high))
        from_low = np.uint32(from_low + np.uint32(pattern >= low))
    store_int64(counts, 0, load_int64(counts, 0) + above)
    store_int64(counts, 1, load_int64(counts, 1) + from_high)
    store_int64(counts, 3, load_int64(counts, 3) + from_low)


@inlined
def _append(group, which, found, number):
    """The first of those that ``which`` marks in a group; the others."""
    store_uint32(found, number, load_uint32(group, _first_of(which)))
    return np.uint64(which & np.uint64(which - np.uint64(1)))


@shared
def _collect(bits, n, low, high, found, number, room):
    """Append what lies between the bounds to the ``number`` that have been found, until there is no room.

    Few groups hold more than UNASKED; asking each how many it holds would take longer than to append as many unasked.
    """
    first, width = np.uint32(low + np.uint32(1)), np.uint32(high - low - np.uint32(1))
    for start in range(0, n, GROUP):
        group = pointer(bits, 4 * start)
        which = _which_within(group, first, width)
        total = number + _number_of(which)
        if number <= room:
            for i in range(UNASKED):
                which = _append(group, which, found, number + i)
            number += UNASKED
            while which != np.uint64(0):
                which = _append(group, which, found, number)
                number += 1
        number = total
    return number


def _sift(read_base, read_magnitudes):
    def sift(spans, bases, num_models, bounds, counts, found, room, size):
        """Args, beside those of the histograms:

        bounds: [K, 2] int64, the lower and the upper one.
        counts: [K, 4] int64, zeros at first; become those above and from the upper bound on, above and from the lower
            bound on.
        found: [K, room + GROUP + UNASKED] uint32; becomes, if they are no more than ``room``, the bit patterns between
            the bounds.
        """
        base_buffer, buffer, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            base = read_base(bases, start, n, base_buffer)
            for k in range(num_models):
                read_magnitudes(spans, num_models, k, base, start, n, buffer, bits)
                _end_group(bits, n)
                low, high = np.uint32(load_int64(bounds, 2 * k)), np.uint32(load_int64(bounds, 2 * k + 1))
                row = counts + 32 * k
                own = pointer(found, 4 * (room + GROUP + UNASKED) * k)
                number = load_int64(row, 2) - load_int64(row, 1)
                number = _collect(bits, n, low, high, own, number, room)
                _compare(bits, n, low, high, row)
                store_int64(row, 2, load_int64(row, 1) + number)
        return np.int64(0)

    return sift


def _nth_equal(read_base, read_magnitudes):
    def nth_equal(spans, bases, wanted, number, position, size):
        """Count the elements of the one model in ``spans`` whose magnitude has the bits ``wanted``, up to ``number``;
        write the index of the last one counted to ``position`` (int64)."""
        base_buffer, buffer, bits = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
        target = np.uint32(wanted)
        total = 0
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            base = read_base(bases, start, n, base_buffer)
            read_magnitudes(spans, 1, 0, base, start, n, buffer, bits)
            here = np.uint32(0)
            for i in range(n):
                here = np.uint32(here + np.uint32(load_uint32(bits, i) == target))
            if total + here >= number:
                for i in range(n):
                    if total < number and load_uint32(bits, i) == target:
                        total += 1
                        store_int64(position, 0, start + i)
                return total
            total += here
        return total

    return nth_equal


_NARROW = _reader(as_float32, _filler(difference32), _filler(difference16))
_WIDE = _reader(as_float64, _filler(difference64), _filler(difference16_64))
histogram_upper, histogram_upper_wide = _histogram_upper(*_NARROW), _histogram_upper(*_WIDE)
histogram_lower, histogram_lower_wide = _histogram_lower(*_NARROW), _histogram_lower(*_WIDE)
sift, sift_wide = _sift(*_NARROW), _sift(*_WIDE)
nth_equal, nth_equal_wide = _nth_equal(*_NARROW), _nth_equal(*_WIDE)
