"""F += Σ_b (Σ_t grad_bt ⊗ input_bt)² for processors, compiled: squares are taken while the sums are in the cache.

Four outputs share each load of four tokens' inputs, along which the loop is vectorised; blocks of outputs are spread
over numba's threads. Numba compiles it at first use (two to three seconds a process).

Shapes: B examples, T tokens, O outputs, I inputs.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GROUP = 4
"""Outputs and tokens at a time: sixteen products for each load of four vectors."""
BLOCK_NUM_OUTPUTS = 64
"""Outputs that a thread does for all examples before it takes the next: their sums of squares stay in its cache."""
MIN_PRODUCTS = 1 << 19
"""Below so many multiplications a second thread costs more than it saves."""


def add_rows(grad_TO: Any, input_TI: Any, fisher_OI: Any, sums_4I: Any, first: int, last: int) -> None:
    """One example, outputs first to last. T and the number of outputs are multiples of 4; ``sums_4I`` is scratch."""
    num_inputs = input_TI.shape[1]
    s0, s1, s2, s3 = sums_4I[0], sums_4I[1], sums_4I[2], sums_4I[3]
    for i in range(first, last, 4):
        for j in range(num_inputs):
            s0[j] = 0.0
            s1[j] = 0.0
            s2[j] = 0.0
            s3[j] = 0.0
        for t in range(0, grad_TO.shape[0], 4):
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
    num_done = len(fisher_OI) // GROUP * GROUP
    if num_done == 0:
        return 0
    places = [(start // GROUP * GROUP, -(-stop // GROUP) * GROUP) for start, stop in spans if stop > start]
    chosen = [b for b, (start, stop) in enumerate(spans) if stop > start]
    num_products = sum(stop - start for start, stop in places) * fisher_OI.numel()
    num_threads = torch.get_num_threads()
    with _one_at_a_time:
        try:
            _compiled()(
                _whole_groups(grad_BTO),
                _whole_groups(input_BTI),
                np.array(chosen, np.int64),
                np.array(places, np.int64),
                fisher_OI.numpy(),
                num_done,
                num_threads if num_products >= MIN_PRODUCTS else 1,
            )
        finally:
            # numba's OpenMP layer is torch's too, and its first call gives all of the process a thread for each core.
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
    return num_done


def _whole_groups(tensor_BTX: torch.Tensor) -> NDArray[np.float32]:
    """With zeros for tokens that are missing in the last group."""
    tensor_BTX = tensor_BTX.detach().float()
    num_missing = -tensor_BTX.shape[1] % GROUP
    if num_missing:
        tensor_BTX = torch.nn.functional.pad(tensor_BTX, (0, 0, 0, num_missing))
    return tensor_BTX.contiguous().numpy()


_one_at_a_time = threading.Lock()  # not every one of numba's threading layers can be entered twice


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba

    matrix, cube, index = numba.float32[:, ::1], numba.float32[:, :, ::1], numba.int64
    # "contract": a product and a sum may become one instruction, as in every matrix product.
    one_example = numba.njit(
        numba.void(matrix, matrix, matrix, matrix, index, index),
        nogil=True,
        fastmath={"contract"},
        error_model="numpy",
    )(add_rows)

    def add_blocks(
        grad_BTO: Any, input_BTI: Any, chosen: Any, places: Any, fisher_OI: Any, num_outputs: int, block: int
    ) -> None:
        for number in numba.prange((num_outputs + block - 1) // block):
            sums_4I = np.empty((4, input_BTI.shape[2]), np.float32)
            first, last = number * block, min(num_outputs, (number + 1) * block)
            for n in range(len(chosen)):
                b, start, stop = chosen[n], places[n, 0], places[n, 1]
                one_example(
                    grad_BTO[b][start:stop], input_BTI[b][start:stop], fisher_OI, sums_4I, first, last
                )

    signature = numba.void(cube, cube, index[::1], index[:, ::1], matrix, index, index)
    run = numba.njit(signature, parallel=True, nogil=True, error_model="numpy")(add_blocks)

    most = numba.get_num_threads()

    def call(
        grad: Any, value: Any, chosen: Any, places: Any, fisher: Any, num_outputs: int, num_threads: int
    ) -> None:
        before = numba.get_num_threads()
        num_threads = min(num_threads, most)
        # Small enough for every thread to have work.
        block = min(BLOCK_NUM_OUTPUTS, -(-num_outputs // (num_threads * GROUP)) * GROUP)
        numba.set_num_threads(num_threads)
        try:
            run(grad, value, chosen, places, fisher, num_outputs, block)
        finally:
            numba.set_num_threads(before)

    return call
