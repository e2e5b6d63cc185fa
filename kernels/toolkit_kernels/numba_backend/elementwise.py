"""Weighted sum, Fisher mean, near swap and the sum of squares, compiled.

``spans`` is the address of a table [2, K] of int64: K addresses, then K dtype codes. Each function returns how many
elements of its output are NaN or infinite. Strips are read as float32, or as float64 in the functions ``..._wide``,
for which an input may be of float64; four models at a time, so that sums stay in registers. A strip is read in full
before it is written: the output may be one of the inputs.
"""

import numpy as np

from toolkit_kernels.numba_backend.bits import (
    BFLOAT16,
    FLOAT32,
    FLOAT64_STRIP,
    STRIP,
    as_float32,
    as_float64,
    bfloat16_at,
    float32_at,
    float64_at,
    inlined,
    item_size,
    load_float64,
    load_int64,
    pointer,
    scratch,
    shared,
    store_float64,
    write_strip,
)

GROUP_BUFFERS = 4 * FLOAT64_STRIP
FISHER_BUFFERS = 2 * GROUP_BUFFERS


@inlined
def _group_size(num_left):
    """How many models to take together: 4, 2 or 1."""
    return 4 if num_left >= 4 else (2 if num_left >= 2 else 1)


@inlined
def _place(spans, num_models, k, start):
    """A pointer to element ``start`` of model k."""
    return pointer(load_int64(spans, k), start * item_size(load_int64(spans, num_models + k)))


# --- weighted sum


def _adder(element):
    @shared
    def add(is_first, many, a, b, c, d, weights, total, n):
        """total = or += the weighted sum of the first ``many`` of four models, in their order."""
        w0, w1 = load_float64(weights, 0), load_float64(weights, 1)
        w2, w3 = load_float64(weights, 2), load_float64(weights, 3)
        if is_first and many == 4:
            for i in range(n):
                x = element(a, i) * w0 + element(b, i) * w1
                store_float64(total, i, x + element(c, i) * w2 + element(d, i) * w3)
        elif is_first and many == 2:
            for i in range(n):
                store_float64(total, i, element(a, i) * w0 + element(b, i) * w1)
        elif is_first:
            for i in range(n):
                store_float64(total, i, element(a, i) * w0)
        elif many == 4:
            for i in range(n):
                x = load_float64(total, i) + element(a, i) * w0 + element(b, i) * w1
                store_float64(total, i, x + element(c, i) * w2 + element(d, i) * w3)
        else:
            for i in range(n):
                store_float64(total, i, load_float64(total, i) + element(a, i) * w0)
            if many == 2:
                for i in range(n):
                    store_float64(total, i, load_float64(total, i) + element(b, i) * w1)

    return add


_add_bfloat16, _add_float32, _add_float64 = _adder(bfloat16_at), _adder(float32_at), _adder(float64_at)


@inlined
def _all_bfloat16(codes, many):
    number = 0
    for k in range(many):
        number += load_int64(codes, k) == BFLOAT16
    return number == many


def _models_adder(as_lane, add_lanes, add_bfloat16):
    @shared
    def add_models(spans, num_models, weights, start, n, total, buffers):
        """total = sum_k weights_k theta_k over n elements from ``start``, in the order of k."""
        k = 0
        while k < num_models:
            many = _group_size(num_models - k)
            codes = spans + 8 * (num_models + k)
            a = _place(spans, num_models, k, start)
            b = _place(spans, num_models, k + (many > 1), start)
            c = _place(spans, num_models, k + 2 * (many > 2), start)
            d = _place(spans, num_models, k + 3 * (many > 2), start)
            if _all_bfloat16(codes, many):
                add_bfloat16(k == 0, many, a, b, c, d, weights + 8 * k, total, n)
            else:
                a = as_lane(load_int64(codes, 0), a, n, pointer(buffers, 0))
                if many > 1:
                    b = as_lane(load_int64(codes, 1), b, n, pointer(buffers, FLOAT64_STRIP))
                if many > 2:
                    c = as_lane(load_int64(codes, 2), c, n, pointer(buffers, 2 * FLOAT64_STRIP))
                    d = as_lane(load_int64(codes, 3), d, n, pointer(buffers, 3 * FLOAT64_STRIP))
                add_lanes(k == 0, many, a, b, c, d, weights + 8 * k, total, n)
            k += many

    return add_models


_add_models = _models_adder(as_float32, _add_float32, _add_bfloat16)
_add_models_wide = _models_adder(as_float64, _add_float64, _add_bfloat16)


def _weighted_sum(add_models):
    def weighted_sum(spans, num_models, weights, out, out_code, size):
        """``weights``: [K + 3] float64, the last three unused but readable."""
        total, buffers = scratch(FLOAT64_STRIP), scratch(GROUP_BUFFERS)
        num_bad = 0
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            add_models(spans, num_models, weights, start, n, total, buffers)
            num_bad += write_strip(out_code, pointer(out, start * item_size(out_code)), n, total)
        return num_bad

    return weighted_sum


weighted_sum, weighted_sum_wide = _weighted_sum(_add_models), _weighted_sum(_add_models_wide)


# --- Fisher mean


def _fisher_adder(element, certainty_element):
    @inlined
    def certainty(fisher, i, weight, floor):
        f = certainty_element(fisher, i)
        return weight * (floor if f < floor else f)

    @inlined
    def put(is_last, x, y, numerator, denominator, i):
        """Divide where the sums are complete: beside the loads of the same loop, that takes little time of its own."""
        store_float64(numerator, i, x / y if is_last else x)
        store_float64(denominator, i, y)
        return np.int64(is_last and y == 0.0)

    @shared
    def add(is_last, many, a, b, c, d, e, f, g, h, weights, floors, numerator, denominator, n):
        """Add w f theta and w f of the first ``many`` of the models a to d with the Fisher information e to h.

        The last group of models leaves the quotient in the numerator. Returns how many denominators are then zero.
        """
        w0, w1 = load_float64(weights, 0), load_float64(weights, 1)
        w2, w3 = load_float64(weights, 2), load_float64(weights, 3)
        f0, f1 = load_float64(floors, 0), load_float64(floors, 1)
        f2, f3 = load_float64(floors, 2), load_float64(floors, 3)
        num_zero = np.int64(0)
        if many == 4:
            for i in range(n):
                p, q = certainty(e, i, w0, f0), certainty(f, i, w1, f1)
                r, s = certainty(g, i, w2, f2), certainty(h, i, w3, f3)
                x = load_float64(numerator, i) + p * element(a, i) + q * element(b, i)
                x = x + r * element(c, i) + s * element(d, i)
                y = load_float64(denominator, i) + p + q + r + s
                num_zero += put(is_last, x, y, numerator, denominator, i)
        elif many == 2:
            for i in range(n):
                p, q = certainty(e, i, w0, f0), certainty(f, i, w1, f1)
                x = load_float64(numerator, i) + p * element(a, i) + q * element(b, i)
                y = load_float64(denominator, i) + p + q
                num_zero += put(is_last, x, y, numerator, denominator, i)
        else:
            for i in range(n):
                p = certainty(e, i, w0, f0)
                x = load_float64(numerator, i) + p * element(a, i)
                y = load_float64(denominator, i) + p
                num_zero += put(is_last, x, y, numerator, denominator, i)
        return num_zero

    return add


def _group_adder(as_lane, add_lanes, add_bfloat16):
    @inlined
    def lane(spans, num_models, k, start, n, buffers, number):
        buffer = pointer(buffers, number * FLOAT64_STRIP)
        return as_lane(load_int64(spans, num_models + k), _place(spans, num_models, k, start), n, buffer)

    @shared
    def add_group(spans, fishers, num_models, k, many, parameters, start, n, numerator, denominator, buffers):
        is_last = k + many == num_models
        weights, floors = parameters + 8 * k, parameters + 8 * (num_models + k)
        k1, k2, k3 = k + (many > 1), k + 2 * (many > 2), k + 3 * (many > 2)
        e = lane(fishers, num_models, k, start, n, buffers, 0)
        f = lane(fishers, num_models, k1, start, n, buffers, 1) if many > 1 else e
        g = lane(fishers, num_models, k2, start, n, buffers, 2) if many > 2 else e
        h = lane(fishers, num_models, k3, start, n, buffers, 3) if many > 2 else e
        if _all_bfloat16(spans + 8 * (num_models + k), many):
            a, b = _place(spans, num_models, k, start), _place(spans, num_models, k1, start)
            c, d = _place(spans, num_models, k2, start), _place(spans, num_models, k3, start)
            return add_bfloat16(
                is_last, many, a, b, c, d, e, f, g, h, weights, floors, numerator, denominator, n
            )
        a = lane(spans, num_models, k, start, n, buffers, 4)
        b = lane(spans, num_models, k1, start, n, buffers, 5) if many > 1 else a
        c = lane(spans, num_models, k2, start, n, buffers, 6) if many > 2 else a
        d = lane(spans, num_models, k3, start, n, buffers, 7) if many > 2 else a
        return add_lanes(is_last, many, a, b, c, d, e, f, g, h, weights, floors, numerator, denominator, n)

    return add_group


def _fisher_mean(add_group, add_models):
    def fisher_mean(spans, fishers, num_models, parameters, out, out_code, size):
        """``parameters``: [3, K] float64 weights, floors, fallback, and three more unused but readable numbers."""
        mean, denominator, fallback = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
        buffers = scratch(FISHER_BUFFERS)
        num_bad = 0
        for start in range(0, size, STRIP):
            n = min(STRIP, size - start)
            for i in range(n):
                store_float64(mean, i, -0.0)  # -0.0 + x is x, for every x
                store_float64(denominator, i, -0.0)
            k = num_zero = 0
            while k < num_models:
                many = _group_size(num_models - k)
                num_zero = add_group(
                    spans, fishers, num_models, k, many, parameters, start, n, mean, denominator, buffers
                )
                k += many
            if num_zero > 0:
                add_models(spans, num_models, parameters + 16 * num_models, start, n, fallback, buffers)
                for i in range(n):
                    if load_float64(denominator, i) == 0.0:
                        store_float64(mean, i, load_float64(fallback, i))
            num_bad += write_strip(out_code, pointer(out, start * item_size(out_code)), n, mean)
        return num_bad

    return fisher_mean


_add_group = _group_adder(
    as_float32, _fisher_adder(float32_at, float32_at), _fisher_adder(bfloat16_at, float32_at)
)
_add_group_wide = _group_adder(
    as_float64, _fisher_adder(float64_at, float64_at), _fisher_adder(bfloat16_at, float64_at)
)
fisher_mean, fisher_mean_wide = (
    _fisher_mean(_add_group, _add_models),
    _fisher_mean(_add_group_wide, _add_models_wide),
)


# --- two inputs


def near_swap(base, base_code, theta, theta_code, limit, out, out_code, size):
    """``limit``: address of t."""
    old, new = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    t = load_float64(limit, 0)
    num_bad = 0
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        as_float64(base_code, pointer(base, start * item_size(base_code)), n, old)
        as_float64(theta_code, pointer(theta, start * item_size(theta_code)), n, new)
        for i in range(n):
            delta = load_float64(new, i) - load_float64(old, i)
            weight = t / abs(delta)
            weight = 1.0 if weight > 1.0 or delta == 0.0 else weight
            store_float64(old, i, load_float64(old, i) + weight * delta)
        num_bad += write_strip(out_code, pointer(out, start * item_size(out_code)), n, old)
    return num_bad


def add_squares(total, values, code, scale, size):
    """total (float32) += scale * values * values. ``scale``: address of the float64."""
    new, old = scratch(FLOAT64_STRIP), scratch(FLOAT64_STRIP)
    factor = load_float64(scale, 0)
    for start in range(0, size, STRIP):
        n = min(STRIP, size - start)
        as_float64(code, pointer(values, start * item_size(code)), n, new)
        for i in range(n):
            value = load_float64(new, i)
            store_float64(old, i, float32_at(pointer(total, start * 4), i) + factor * value * value)
        write_strip(FLOAT32, pointer(total, start * 4), n, old)
    return np.int64(0)
