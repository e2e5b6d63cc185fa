"""F += Σ_b (Σ_t grad_bt ⊗ input_bt)² for processors, compiled: one pass, squares taken while the sums are in the cache.

Four outputs share each load of four tokens' inputs, along which the loop is vectorised. Numba compiles it at first use
(about a second a process).

Shapes: B examples, T tokens, O outputs, I inputs.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit_kernels.pool import Pool

Floats = NDArray[np.float32]
GROUP = 4
"""Outputs and tokens at a time: sixteen products for each load of four vectors."""
CACHED_NUM_ELEMENTS = 1 << 16
"""Elements of the Fisher buffer (256 KiB) that stay in the cache while several examples are added to them."""
MIN_PRODUCTS = 1 << 21
"""Below so many multiplications a second thread costs more than it saves."""


def add_rows(grad_BTO: Any, input_BTI: Any, fisher_OI: Any, sums_4I: Any, first: int, last: int) -> None:
    """Outputs first to last of the Fisher buffer; T and their number are multiples of 4. ``sums_4I`` is scratch."""
    num_inputs = input_BTI.shape[2]
    s0, s1, s2, s3 = sums_4I[0], sums_4I[1], sums_4I[2], sums_4I[3]
    for i in range(first, last, 4):
        for b in range(grad_BTO.shape[0]):
            grad_TO, input_TI = grad_BTO[b], input_BTI[b]
            for j in range(num_inputs):
                s0[j] = 0.0
                s1[j] = 0.0
                s2[j] = 0.0
                s3[j] = 0.0
            for t in range(0, grad_BTO.shape[1], 4):
                r0, r1, r2, r3 = input_TI[t], input_TI[t + 1], input_TI[t + 2], input_TI[t + 3]
                g0, g1, g2, g3 = grad_TO[t], grad_TO[t + 1], grad_TO[t + 2], grad_TO[t + 3]
                a0, a1, a2, a3 = g0[i], g1[i], g2[i], g3[i]
                b0, b1, b2, b3 = g0[i + 1], g1[i + 1], g2[i + 1], g3[i + 1]
                c0, c1, c2, c3 = g0[i + 2], g1[i + 2], g2[i + 2], g3[i + 2]
                d0, d1, d2, d3 = g0[i + 3], g1[i + 3], g2[i + 3], g3[i + 3]
                for j in range(num_inputs):
                    v0, v1, v2, v3 = r0[j], r1[j], r2[j], r3[j]
                    p0 = s0[j] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                    p1 = s1[j] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                    p2 = s2[j] + c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                    p3 = s3[j] + d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
                    s0[j] = p0
                    s1[j] = p1
                    s2[j] = p2
                    s3[j] = p3
            for j in range(num_inputs):
                fisher_OI[i, j] += s0[j] * s0[j]
                fisher_OI[i + 1, j] += s1[j] * s1[j]
                fisher_OI[i + 2, j] += s2[j] * s2[j]
                fisher_OI[i + 3, j] += s3[j] * s3[j]


def add_product_squares(
    fisher_OI: torch.Tensor, grad_BTO: torch.Tensor, input_BTI: torch.Tensor, spans: list[tuple[int, int]]
) -> int:
    """The sum, in float32 and on torch's number of threads. Returns how many outputs are done: a multiple of 4.

    Args:
        fisher_OI: float32, contiguous, changed in place.
        grad_BTO, input_BTI: any floating type.
        spans: the tokens of each example that have a gradient; the others are not read.
    """
    kernel = _kernel()
    num_done = len(fisher_OI) // GROUP * GROUP
    num_inputs = input_BTI.shape[2]
    fisher, parts = fisher_OI.numpy(), _parts(grad_BTO, input_BTI, spans)
    num_products = sum(stop - start for start, stop in spans) * fisher.size
    num_threads = torch.get_num_threads() if num_products >= MIN_PRODUCTS else 1
    step = max(GROUP, -(-num_done // (num_threads * GROUP)) * GROUP)

    def run(first: int) -> None:
        sums = np.empty((GROUP, num_inputs), np.float32)
        last = min(num_done, first + step)
        block = max(GROUP, CACHED_NUM_ELEMENTS // num_inputs // GROUP * GROUP) if len(parts) > 1 else step
        for start in range(first, last, block):
            for grad, value in parts:
                kernel(grad, value, fisher, sums, start, min(last, start + block))

    pieces = range(0, num_done, step)
    if len(pieces) == 1:
        run(0)
    else:
        _pool(num_threads).map(run, pieces)
    return num_done


def _parts(
    grad_BTO: torch.Tensor, input_BTI: torch.Tensor, spans: list[tuple[int, int]]
) -> list[tuple[Floats, Floats]]:
    """Both factors with tokens in whole groups: all examples together, or each with its own span."""
    grad, value = _whole_groups(grad_BTO), _whole_groups(input_BTI)
    places = [(start // GROUP * GROUP, -(-stop // GROUP) * GROUP) for start, stop in spans]
    if all(place == (0, grad.shape[1]) for place in places):
        return [(grad, value)]
    return [
        (grad[b : b + 1, start:stop], value[b : b + 1, start:stop])
        for b, (start, stop) in enumerate(places)
        if spans[b][1] > spans[b][0]
    ]


def _whole_groups(tensor_BTX: torch.Tensor) -> Floats:
    tensor_BTX = tensor_BTX.detach().float()
    num_missing = -tensor_BTX.shape[1] % GROUP
    if num_missing:
        tensor_BTX = torch.nn.functional.pad(tensor_BTX, (0, 0, 0, num_missing))
    return tensor_BTX.contiguous().numpy()


_compiling = threading.Lock()


def _kernel() -> Callable[..., None]:
    with _compiling:
        return _compiled()


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba

    matrix, cube = numba.float32[:, ::1], numba.float32[:, :, ::1]
    signature = numba.void(cube, cube, matrix, matrix, numba.int64, numba.int64)
    # "contract": a product and a sum may become one instruction, as in every matrix product.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    return numba.njit(signature, **options)(add_rows)


@functools.cache
def _pool(num_threads: int) -> Pool:
    return Pool(num_threads)
