"""Consensus of sparse deltas, compiled: trimmed by magnitude, masked at random, signs elected or not.

For each strip, first all v_k are formed, then added up, and once the sign is known, those that have it.
"""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    BFLOAT16,
    FLOAT64_STRIP,
    STRIP,
    UINT32_STRIP,
    as_float32,
    as_float64,
    bfloat16_at,
    difference16,
    difference16_64,
    difference32,
    difference64,
    float32_at,
    float64_at,
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
    write_strip,
)
from toolkit_kernels.numba_backend.philox import random_words

# Columns of the table that says which elements stay, one row a model.
IS_MASKED, AMONG_BITS, AMONG_LAST, OUTSIDE_BITS, OUTSIDE_LAST, IS_RANDOM, RANDOM_MAX, KEY0, KEY1, STREAM = (
    range(10)
)
NUM_COLUMNS = 10
EVERY_INDEX = 1 << 62  # the last index of a set that leaves nothing out


@inlined
def _strip(values, k):
    return pointer(values, FLOAT64_STRIP * k)


@inlined
def _smallest_in(bits, last, here):
    """The smallest magnitude that belongs to a set of largest elements from element ``here`` on, up to the next cut."""
    return np.uint32(min(bits if here <= last else bits + 1, 0xFFFFFFFF))


@inlined
def _next_cut(last, start, begin, end):
    """Where the elements that equal the smallest of a set stop to belong to it, if between ``begin`` and ``end``."""
    cut = last + 1 - start
    return cut if begin < cut and cut < end else end


@inlined
def _is_bounded(row):
    """Whether magnitudes decide: a set of largest leaves something out, or some are to be left out."""
    leaves_out = load_int64(row, AMONG_BITS) != 0 or load_int64(row, AMONG_LAST) < EVERY_INDEX
    return leaves_out or load_int64(row, OUTSIDE_BITS) != 0xFFFFFFFF


@shared
def _draw(row, start, random):
    """A random word for each element of a strip that begins at ``start``, a multiple of 4."""
    key0, key1 = load_int64(row, KEY0), load_int64(row, KEY1)
    random_words(start // 4, load_int64(row, STREAM), 0, key0, key1, STRIP // 4, random)


def _value_maker(element, base_element, difference):
    @inlined
    def value(theta, base, i, weight, rescale):
        return weight * (rescale * (element(theta, i) - base_element(base, i)))

    @shared
    def make_all(n, weight, rescale, theta, base, values):
        for i in range(n):
            store_float64(values, i, value(theta, base, i, weight, rescale))

    @shared
    def make_random(random_max, n, weight, rescale, theta, base, random, values):
        for i in range(n):
            number = value(theta, base, i, weight, rescale)
            store_float64(values, i, number if load_uint32(random, i) <= random_max else 0.0)

    @shared
    def make_bounded(row, start, n, weight, rescale, theta, base, values):
        among_last, outside_last = load_int64(row, AMONG_LAST), load_int64(row, OUTSIDE_LAST)
        begin = 0
        while begin < n:
            end = _next_cut(outside_last, start, begin, _next_cut(among_last, start, begin, n))
            smallest = _smallest_in(load_int64(row, AMONG_BITS), among_last, start + begin)
            too_large = _smallest_in(load_int64(row, OUTSIDE_BITS), outside_last, start + begin)
            for i in range(begin, end):
                bits = magnitude_bits(difference(theta, base, i))
                stays = (bits >= smallest) & (bits < too_large)
                store_float64(values, i, value(theta, base, i, weight, rescale) if stays else 0.0)
            begin = end

    @shared
    def make_values(row, start, n, weight, rescale, theta, base, random, values):
        """values = weight * (rescale * (theta - base)) where it stays, else zero."""
        is_random = load_int64(row, IS_RANDOM) != 0
        is_bounded = load_int64(row, IS_MASKED) != 0 and _is_bounded(row)
        if is_bounded:
            make_bounded(row, start, n, weight, rescale, theta, base, values)
        elif not is_random:
            make_all(n, weight, rescale, theta, base, values)
        if is_random:
            _draw(row, start, random)
            random_max = np.uint32(load_int64(row, RANDOM_MAX))
            if is_bounded:
                for i in range(n):
                    number = load_float64(values, i)
                    store_float64(values, i, number if load_uint32(random, i) <= random_max else 0.0)
            else:
                make_random(random_max, n, weight, rescale, theta, base, random, values)

    return make_values


def _strip_maker(as_lane, make_values, make_from_bfloat16):
    @shared
    def make_strip(spans, num_models, k, weights, masks, strip, start, n, base, buffer, random, values):
        """v_k of the strip that begins at element ``strip`` of these, ``start + strip`` of the tensor."""
        code = load_int64(spans, num_models + k)
        theta = pointer(load_int64(spans, k), strip * item_size(code))
        weight, rescale = load_float64(weights, k), load_float64(weights, num_models + k)
        row, v = masks + 8 * NUM_COLUMNS * k, _strip(values, k)
        if code == BFLOAT16:
            make_from_bfloat16(row, start + strip, n, weight, rescale, theta, base, random, v)
        else:
            theta = as_lane(code, theta, n, buffer)
            make_values(row, start + strip, n, weight, rescale, theta, base, random, v)

    return make_strip


@shared
def _add_values(values, num_models, n, total):
    """total = sum_k v_k, from +0.0 on; four at a time in registers."""
    for i in range(n):
        store_float64(total, i, 0.0)
    k = 0
    while k + 4 <= num_models:
        a, b = _strip(values, k), _strip(values, k + 1)
        c, d = _strip(values, k + 2), _strip(values, k + 3)
        for i in range(n):
            x = load_float64(total, i) + load_float64(a, i) + load_float64(b, i)
            store_float64(total, i, x + load_float64(c, i) + load_float64(d, i))
        k += 4
    if k + 3 == num_models:
        a, b, c = _strip(values, k), _strip(values, k + 1), _strip(values, k + 2)
        for i in range(n):
            x = load_float64(total, i) + load_float64(a, i) + load_float64(b, i)
            store_float64(total, i, x + load_float64(c, i))
        k += 3
    while k < num_models:
        a = _strip(values, k)
        for i in range(n):
            store_float64(total, i, load_float64(total, i) + load_float64(a, i))
        k += 1


@inlined
def _has_sign(value, sign):
    return value * sign > 0.0


@inlined
def _nonzero(divisor, negligible):
    return 1.0 if abs(divisor) <= negligible else divisor


@shared
def _elect_four(values, weights, num_models, n, negligible, is_normalized, zeros, mean):
    """Sums or averages of the v_k that have the sign of the sum of all; at most four models, none of which is stored
    in between."""
    a = _strip(values, 0)
    b = _strip(values, 1) if num_models > 1 else zeros
    c = _strip(values, 2) if num_models > 2 else zeros
    d = _strip(values, 3) if num_models > 3 else zeros
    w0, w1, w2, w3 = load_float64(weights, 0), 0.0, 0.0, 0.0
    if num_models > 1:
        w1 = load_float64(weights, 1)
    if num_models > 2:
        w2 = load_float64(weights, 2)
    if num_models > 3:
        w3 = load_float64(weights, 3)
    for i in range(n):
        x, y, z, t = load_float64(a, i), load_float64(b, i), load_float64(c, i), load_float64(d, i)
        sign = 1.0 if x + y + z + t >= 0.0 else -1.0
        total = (x if _has_sign(x, sign) else 0.0) + (y if _has_sign(y, sign) else 0.0)
        total = total + (z if _has_sign(z, sign) else 0.0) + (t if _has_sign(t, sign) else 0.0)
        if is_normalized != 0:
            divisor = (w0 if _has_sign(x, sign) else 0.0) + (w1 if _has_sign(y, sign) else 0.0)
            divisor = divisor + (w2 if _has_sign(z, sign) else 0.0) + (w3 if _has_sign(t, sign) else 0.0)
            total = total / _nonzero(divisor, negligible)
        store_float64(mean, i, total)


@shared
def _add_elected(values, weights, num_models, n, sign, total, divisor):
    """Sums of the v_k, and of their weights, that have the sign of ``sign`` (that of zero is +)."""
    for i in range(n):
        store_float64(total, i, 0.0)
        store_float64(divisor, i, 0.0)
    for k in range(num_models):
        a, w = _strip(values, k), load_float64(weights, k)
        for i in range(n):
            x = load_float64(a, i)
            has_x = _has_sign(x, 1.0 if load_float64(sign, i) >= 0.0 else -1.0)
            store_float64(total, i, load_float64(total, i) + (x if has_x else 0.0))
            store_float64(divisor, i, load_float64(divisor, i) + (w if has_x else 0.0))


@shared
def _elect_many(values, weights, num_models, n, negligible, is_normalized, mean, total, divisor):
    """The same of any number of models."""
    _add_values(values, num_models, n, mean)
    _add_elected(values, weights, num_models, n, mean, total, divisor)
    for i in range(n):
        number = _nonzero(load_float64(divisor, i), negligible) if is_normalized != 0 else 1.0
        store_float64(mean, i, load_float64(total, i) / number)


@inlined
def _sum_of_weights(weights, num_models):
    total = 0.0
    for k in range(num_models):
        total += load_float64(weights, k)
    return total


@inlined
def _combine(values, weights, num_models, n, is_elected, negligible, is_normalized, mean, total, divisor):
    """mean = the sum of the values, or of those whose sign is elected."""
    if is_elected == 0:
        _add_values(values, num_models, n, mean)
    elif num_models <= 4:
        _elect_four(values, weights, num_models, n, negligible, is_normalized, total, mean)
    else:
        _elect_many(values, weights, num_models, n, negligible, is_normalized, mean, total, divisor)


@inlined
def _clear(strip):
    for i in range(STRIP):
        store_float64(strip, i, 0.0)


@inlined
def _divide(mean, constant, n):
    if constant != 1.0:
        for i in range(n):
            store_float64(mean, i, load_float64(mean, i) / constant)


def _consensus(as_lane, element, make_strip):
    def consensus(
        spans,
        bases,
        num_models,
        weights,
        masks,
        values,
        is_elected,
        is_normalized,
        start,
        out,
        out_code,
        size,
    ):
        """Args, beside those of the module elementwise:

        bases: [2, 1] int64, address and code of theta_0.
        weights: [2 K + 2] float64: weights, rescale factors, scale, negligible divisor.
        masks: [K, NUM_COLUMNS] int64; RANDOM_MAX is the largest word that stays.
        values: room for K strips of FLOAT64_STRIP bytes.
        start: index of the first element in the whole tensor.
        """
        base_buffer, theta_buffer = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
        random = scratch(UINT32_STRIP)
        mean, total, divisor = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
        base_address, base_code = load_int64(bases, 0), load_int64(bases, 1)
        scale = load_float64(weights, 2 * num_models)
        negligible = load_float64(weights, 2 * num_models + 1)
        weight_sum = _sum_of_weights(weights, num_models)
        constant = _nonzero(weight_sum, negligible) if is_normalized != 0 and is_elected == 0 else 1.0
        num_bad = 0
        _clear(total)
        for strip in range(0, size, STRIP):
            n = min(STRIP, size - strip)
            base = as_lane(base_code, pointer(base_address, strip * item_size(base_code)), n, base_buffer)
            for k in range(num_models):
                make_strip(
                    spans, num_models, k, weights, masks, strip, start, n, base, theta_buffer, random, values
                )
            _combine(
                values, weights, num_models, n, is_elected, negligible, is_normalized, mean, total, divisor
            )
            _divide(mean, constant, n)
            for i in range(n):
                store_float64(mean, i, element(base, i) + scale * load_float64(mean, i))
            num_bad += write_strip(out_code, pointer(out, strip * item_size(out_code)), n, mean)
        return num_bad

    return consensus


_make_strip = _strip_maker(
    as_float32,
    _value_maker(float32_at, float32_at, difference32),
    _value_maker(bfloat16_at, float32_at, difference16),
)
_make_strip_wide = _strip_maker(
    as_float64,
    _value_maker(float64_at, float64_at, difference64),
    _value_maker(bfloat16_at, float64_at, difference16_64),
)
consensus = _consensus(as_float32, float32_at, _make_strip)
consensus_wide = _consensus(as_float64, float64_at, _make_strip_wide)
