"""Consensus of sparse deltas, compiled: trimmed by magnitude, masked at random, signs elected or not.

One pass: instead of all v_k, which would be needed again once the sign is known, the sums over positive and over
negative v_k are formed side by side.
"""

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
    store_uint32,
    write_strip,
)
from toolkit_kernels.numba_backend.philox import random_words

FLOAT64_STRIP = 8 * STRIP
UINT32_STRIP = 4 * STRIP

# Columns of the table that says which elements stay, one row a model.
IS_MASKED, AMONG_BITS, AMONG_LAST, OUTSIDE_BITS, OUTSIDE_LAST, IS_RANDOM, RANDOM_MAX, KEY0, KEY1, STREAM = (
    range(10)
)
NUM_COLUMNS = 10


@inlined
def _last_in_strip(last, start):
    """The last index of a set, counted from the strip's start and small enough for 32 bits."""
    return np.int32(min(max(last - start, -1), STRIP))


@inlined
def _keep(row, start, n, weight, rescale, delta, random):
    """delta = weight * (rescale * delta) where it stays, else zero. ``start``: index of the strip in the tensor, a
    multiple of 4."""
    if load_int64(row, IS_RANDOM) != 0:
        key0, key1 = load_int64(row, KEY0), load_int64(row, KEY1)
        random_words(start // 4, load_int64(row, STREAM), 0, key0, key1, STRIP // 4, random)
    else:
        for i in range(n):
            store_uint32(random, i, np.uint32(0))
    random_max = np.uint32(load_int64(row, RANDOM_MAX))
    among_bits, outside_bits = (
        np.uint32(load_int64(row, AMONG_BITS)),
        np.uint32(load_int64(row, OUTSIDE_BITS)),
    )
    among_last = _last_in_strip(load_int64(row, AMONG_LAST), start)
    outside_last = _last_in_strip(load_int64(row, OUTSIDE_LAST), start)
    for i in range(n):
        number = load_float64(delta, i)
        bits, place = magnitude_bits(number), np.int32(i)
        stays = (bits > among_bits) | ((bits == among_bits) & (place <= among_last))
        stays &= not ((bits > outside_bits) | ((bits == outside_bits) & (place <= outside_last)))
        stays &= load_uint32(random, i) <= random_max
        store_float64(delta, i, weight * (rescale * number) if stays else 0.0)


def consensus(
    spans, base_spans, num_models, weights, masks, is_elected, is_normalized, start, out, out_code, size
):
    """Args, beside those of the module elementwise:

    base_spans: [2, 1] int64, address and code of theta_0.
    weights: [2 K + 1] float64: weights, rescale factors, scale.
    masks: [K, NUM_COLUMNS] int64; RANDOM_MAX is the largest word that stays.
    start: index of the first element in the whole tensor.
    """
    base, delta, random = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(UINT32_STRIP)
    total, positive, negative = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    positive_weight, negative_weight = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    base_address, base_code = load_int64(base_spans, 0), load_int64(base_spans, 1)
    scale = load_float64(weights, 2 * num_models)
    weight_of_all = 0.0
    for k in range(num_models):
        weight_of_all += load_float64(weights, k)
    if is_normalized == 0 or weight_of_all == 0.0:
        weight_of_all = 1.0
    num_bad = 0
    for strip in range(0, size, STRIP):
        n = min(STRIP, size - strip)
        read_strip(base_code, base_address + strip * item_size(base_code), n, base)
        for i in range(n):
            store_float64(total, i, 0.0)
            store_float64(positive, i, 0.0)
            store_float64(negative, i, 0.0)
            store_float64(positive_weight, i, 0.0)
            store_float64(negative_weight, i, 0.0)
        for k in range(num_models):
            code = load_int64(spans, num_models + k)
            read_strip(code, load_int64(spans, k) + strip * item_size(code), n, delta)
            weight, rescale = load_float64(weights, k), load_float64(weights, num_models + k)
            row = masks + 8 * NUM_COLUMNS * k
            if load_int64(row, IS_MASKED) != 0:
                for i in range(n):
                    store_float64(delta, i, load_float64(delta, i) - load_float64(base, i))
                _keep(row, start + strip, n, weight, rescale, delta, random)
            else:
                for i in range(n):
                    number = load_float64(delta, i) - load_float64(base, i)
                    store_float64(delta, i, weight * (rescale * number))
            if is_elected != 0:
                for i in range(n):
                    number = load_float64(delta, i)
                    store_float64(total, i, load_float64(total, i) + number)
                    is_positive, is_negative = number > 0.0, number < 0.0
                    store_float64(positive, i, load_float64(positive, i) + (number if is_positive else 0.0))
                    store_float64(negative, i, load_float64(negative, i) + (number if is_negative else 0.0))
                    more = load_float64(positive_weight, i) + (weight if is_positive else 0.0)
                    store_float64(positive_weight, i, more)
                    more = load_float64(negative_weight, i) + (weight if is_negative else 0.0)
                    store_float64(negative_weight, i, more)
            else:
                for i in range(n):
                    number = load_float64(delta, i)
                    store_float64(total, i, load_float64(total, i) + number)
        if is_elected != 0:
            for i in range(n):
                is_positive = load_float64(total, i) >= 0.0
                number = load_float64(positive, i) if is_positive else load_float64(negative, i)
                divisor = (
                    load_float64(positive_weight, i) if is_positive else load_float64(negative_weight, i)
                )
                divisor = 1.0 if is_normalized == 0 or divisor == 0.0 else divisor
                store_float64(total, i, load_float64(base, i) + scale * (number / divisor))
        else:
            for i in range(n):
                number = load_float64(total, i) / weight_of_all
                store_float64(total, i, load_float64(base, i) + scale * number)
        num_bad += write_strip(out_code, out + strip * item_size(out_code), n, total)
    return num_bad
