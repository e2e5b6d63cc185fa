"""Weighted sum, Fisher mean, near swap and the sum of squares, compiled.

``spans`` is the address of a table [2, K] of int64: K addresses, then K dtype codes. Each function returns how many
elements of its output are NaN or infinite. A strip is read in full before it is written, so that the output may be
one of the inputs.
"""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    STRIP,
    bfloat16_at,
    float16_at,
    float32_at,
    float64_at,
    inlined,
    item_size,
    load_float64,
    load_int64,
    read_strip,
    scratch,
    store_float64,
    write_strip,
)

FLOAT64_STRIP = 8 * STRIP


def _strip_adder(element):
    """Adds up to four models of one dtype; sums stay in registers. ``many`` says how many; the first set the total."""

    @inlined
    def add(is_first, many, a, b, c, d, weights, total, n):
        w0, w1, w2, w3 = (
            load_float64(weights, 0),
            load_float64(weights, 1),
            load_float64(weights, 2),
            load_float64(weights, 3),
        )
        if many == 4:
            if is_first:
                for i in range(n):
                    x = element(a, i) * w0 + element(b, i) * w1
                    store_float64(total, i, x + element(c, i) * w2 + element(d, i) * w3)
            else:
                for i in range(n):
                    x = load_float64(total, i) + element(a, i) * w0 + element(b, i) * w1
                    store_float64(total, i, x + element(c, i) * w2 + element(d, i) * w3)
        elif many >= 2:
            if is_first:
                for i in range(n):
                    store_float64(total, i, element(a, i) * w0 + element(b, i) * w1)
            else:
                for i in range(n):
                    store_float64(total, i, load_float64(total, i) + element(a, i) * w0 + element(b, i) * w1)
        elif is_first:
            for i in range(n):
                store_float64(total, i, element(a, i) * w0)
        else:
            for i in range(n):
                store_float64(total, i, load_float64(total, i) + element(a, i) * w0)

    return add


_add_float16 = _strip_adder(float16_at)
_add_bfloat16 = _strip_adder(bfloat16_at)
_add_float32 = _strip_adder(float32_at)
_add_float64 = _strip_adder(float64_at)


@inlined
def _add_group(code, is_first, many, a, b, c, d, weights, total, n):
    if code == BFLOAT16:
        _add_bfloat16(is_first, many, a, b, c, d, weights, total, n)
    elif code == FLOAT32:
        _add_float32(is_first, many, a, b, c, d, weights, total, n)
    elif code == FLOAT16:
        _add_float16(is_first, many, a, b, c, d, weights, total, n)
    else:
        _add_float64(is_first, many, a, b, c, d, weights, total, n)


@inlined
def _group_size(spans, k, num_models):
    """How many models from k on are taken together: 4, 2 or 1 of one dtype."""
    same = 1
    while same < 4 and k + same < num_models:
        if load_int64(spans, num_models + k + same) != load_int64(spans, num_models + k):
            break
        same += 1
    return 2 if same == 3 else same


@inlined
def add_models(spans, num_models, weights, start, n, total):
    """total = sum_k weights_k theta_k over n elements from ``start``, in the order of k."""
    k = 0
    while k < num_models:
        many = _group_size(spans, k, num_models)
        code = load_int64(spans, num_models + k)
        offset = start * item_size(code)
        a = load_int64(spans, k) + offset
        b = load_int64(spans, k + (many > 1)) + offset
        c = load_int64(spans, k + 2 * (many > 2)) + offset
        d = load_int64(spans, k + 3 * (many > 2)) + offset
        _add_group(code, k == 0, many, a, b, c, d, weights + 8 * k, total, n)
        k += many


def weighted_sum(spans, num_models, weights, out, out_code, size):
    """``weights``: [K + 3] float64, the last three unused but readable."""
    total = scratch(FLOAT64_STRIP)
    num_bad = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        add_models(spans, num_models, weights, start, n, total)
        num_bad += write_strip(out_code, out + start * item_size(out_code), n, total)
    return num_bad


def _strip_meaner(element):
    @inlined
    def add(theta, fisher, weight, floor, numerator, denominator, n):
        for i in range(n):
            f = load_float64(fisher, i)
            certainty = weight * (floor if f < floor else f)
            store_float64(denominator, i, load_float64(denominator, i) + certainty)
            store_float64(numerator, i, load_float64(numerator, i) + certainty * element(theta, i))

    return add


_mean_float16 = _strip_meaner(float16_at)
_mean_bfloat16 = _strip_meaner(bfloat16_at)
_mean_float32 = _strip_meaner(float32_at)
_mean_float64 = _strip_meaner(float64_at)


def fisher_mean(spans, fisher_spans, num_models, parameters, out, out_code, size):
    """``parameters``: [3, K] float64 weights, floors, fallback, and three more unused but readable numbers."""
    fisher, plain = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    numerator, denominator = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    num_bad = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        for i in range(n):
            store_float64(numerator, i, -0.0)  # -0.0 + x is x, for every x
            store_float64(denominator, i, -0.0)
        for k in range(num_models):
            weight, floor = load_float64(parameters, k), load_float64(parameters, num_models + k)
            code = load_int64(fisher_spans, num_models + k)
            read_strip(code, load_int64(fisher_spans, k) + start * item_size(code), n, fisher)
            code = load_int64(spans, num_models + k)
            theta = load_int64(spans, k) + start * item_size(code)
            if code == BFLOAT16:
                _mean_bfloat16(theta, fisher, weight, floor, numerator, denominator, n)
            elif code == FLOAT32:
                _mean_float32(theta, fisher, weight, floor, numerator, denominator, n)
            elif code == FLOAT16:
                _mean_float16(theta, fisher, weight, floor, numerator, denominator, n)
            else:
                _mean_float64(theta, fisher, weight, floor, numerator, denominator, n)
        num_zero = 0
        for i in range(n):
            num_zero += load_float64(denominator, i) == 0.0
        if num_zero > 0:
            add_models(spans, num_models, parameters + 16 * num_models, start, n, plain)
            for i in range(n):
                if load_float64(denominator, i) == 0.0:
                    store_float64(denominator, i, 1.0)
                    store_float64(numerator, i, load_float64(plain, i))
        for i in range(n):
            store_float64(numerator, i, load_float64(numerator, i) / load_float64(denominator, i))
        num_bad += write_strip(out_code, out + start * item_size(out_code), n, numerator)
    return num_bad


def near_swap(base, base_code, theta, theta_code, limit, out, out_code, size):
    """``limit``: address of t."""
    old, new = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    t = load_float64(limit, 0)
    num_bad = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        read_strip(base_code, base + start * item_size(base_code), n, old)
        read_strip(theta_code, theta + start * item_size(theta_code), n, new)
        for i in range(n):
            delta = load_float64(new, i) - load_float64(old, i)
            weight = t / abs(delta)
            weight = 1.0 if weight > 1.0 or delta == 0.0 else weight
            store_float64(old, i, load_float64(old, i) + weight * delta)
        num_bad += write_strip(out_code, out + start * item_size(out_code), n, old)
    return num_bad


def add_squares(total, values, code, scale, size):
    """total (float32) += scale * values * values. ``scale``: address of the float64."""
    new, old = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    factor = load_float64(scale, 0)
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        read_strip(code, values + start * item_size(code), n, new)
        read_strip(FLOAT32, total + start * 4, n, old)
        for i in range(n):
            value = load_float64(new, i)
            store_float64(old, i, load_float64(old, i) + factor * value * value)
        write_strip(FLOAT32, total + start * 4, n, old)
    return np.int64(0)
