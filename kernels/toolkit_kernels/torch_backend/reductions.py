"""Passes that read a tensor and return numbers: sums of products, histograms, comparisons, counts.

Legend: C elements of a chunk, K models, B blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit_kernels.rules import BLOCK, Floats, Inputs
from toolkit_kernels.torch_backend.masks import magnitude_bits
from toolkit_kernels.torch_backend.memory import CPU_CHUNK, Chunk, chunks_of, scratch, tensor_of

# Of each dtype: the integers of its width, and its exponent's bits, which are all set in NaN and infinity.
EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16


def gram(inputs: Inputs) -> Floats:
    """[K, K] sums of products by the tree of ``Backend.gram``."""
    num_models = len(inputs.theta)
    sums_BKK = np.zeros((-(-inputs.size // BLOCK), num_models, num_models))
    for chunk in chunks_of(inputs, 2 * num_models + 1):
        num_blocks = -(-chunk.size // BLOCK)
        memory = scratch.matrix(2 * num_models + 1, num_blocks * BLOCK, chunk.device)
        delta_KC, product_KC, base_C = memory[:num_models], memory[num_models:-1], memory[-1]
        delta_KC[:, chunk.size :].zero_()
        _load_deltas(chunk, delta_KC[:, : chunk.size], base_C[: chunk.size])
        first = chunk.offset // BLOCK
        for i in range(num_models):
            _add_products(delta_KC, product_KC, i, sums_BKK[first : first + num_blocks])
    return _tree_sum(sums_BKK)


def _load_deltas(chunk: Chunk, delta_KC: Tensor, base_C: Tensor) -> None:
    if chunk.base is not None:
        base_C.copy_(chunk.base)
    for delta_C, theta_C in zip(delta_KC, chunk.theta, strict=True):
        delta_C.copy_(theta_C)
        if chunk.base is not None:
            delta_C.sub_(base_C)


def _add_products(delta_KC: Tensor, product_KC: Tensor, i: int, sums_BKK: Floats) -> None:
    """Fill row and column i from the diagonal on with the sum of each block: halves are added down to one number."""
    num_models, size = delta_KC.shape
    # Several models at once, but fewer elements than those from which torch uses threads of its own.
    step = num_models if delta_KC.device.type != "cpu" else max(CPU_CHUNK // size, 1)
    for j in range(i, num_models, step):
        product_JC = product_KC[j : j + step]
        torch.mul(delta_KC[j : j + step], delta_KC[i], out=product_JC)
        blocks_JBW = product_JC.view(len(product_JC), -1, BLOCK)
        half = BLOCK // 2
        while half:
            blocks_JBW[..., :half].add_(blocks_JBW[..., half : 2 * half])
            half //= 2
        sums_BJ = blocks_JBW[..., 0].t().cpu().numpy()
        sums_BKK[:, i, j : j + step] = sums_BJ
        sums_BKK[:, j : j + step, i] = sums_BJ


def _tree_sum(sums_BKK: Floats) -> Floats:
    """Add neighbours, filled up with zeros."""
    while len(sums_BKK) > 1:
        if len(sums_BKK) % 2:
            sums_BKK = np.concatenate([sums_BKK, np.zeros_like(sums_BKK[:1])])
        sums_BKK = sums_BKK[0::2] + sums_BKK[1::2]
    return sums_BKK[0] if len(sums_BKK) else np.zeros(sums_BKK.shape[1:])


def histogram(inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
    """[K, bins] counts of magnitudes by the upper or lower part of their bits."""
    num_models = len(inputs.theta)
    # One bin more at either end takes what has other upper bits.
    num_bins = UPPER_BINS if prefixes is None else LOWER_BINS + 2
    device = tensor_of(inputs.theta[0]).device
    # Zeroed by numpy: there are enough of them for torch to use threads of its own.
    counts = torch.from_numpy(np.zeros((num_models, num_bins), dtype=np.int64)).to(device)
    for chunk in chunks_of(inputs, 2):
        (ones_C,) = scratch.rows(1, chunk.size, device, torch.int64)
        ones_C.fill_(1)
        for k in range(num_models):
            bins_C = magnitude_bits(_delta(chunk, k))
            if prefixes is None:
                bins_C.bitwise_right_shift_(16)
            else:
                bins_C.sub_(prefixes[k] << 16).clamp_(-1, LOWER_BINS).add_(1)
            counts[k].index_add_(0, bins_C, ones_C)
    return (counts if prefixes is None else counts[:, 1:-1]).cpu().numpy()


def sift(
    inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
) -> tuple[NDArray[np.int64], list[NDArray[np.uint32]]]:
    """[K, 4] counts of magnitudes above or at the bounds, and those between them."""
    counts = np.zeros((len(bounds), 4), np.int64)
    found: list[list[NDArray[np.uint32]]] = [[np.empty(0, np.uint32)] for _ in bounds]
    for chunk in chunks_of(inputs, 2):
        (mask_C,) = scratch.rows(1, chunk.size, chunk.device, torch.bool)
        for k, (low, high) in enumerate(bounds):
            bits_C = magnitude_bits(_delta(chunk, k))
            masks = ((torch.gt, high), (torch.ge, high), (torch.gt, low), (torch.ge, low))
            here = [int(torch.count_nonzero(compare(bits_C, bound, out=mask_C))) for compare, bound in masks]
            within = counts[k, 2] - counts[k, 1]
            counts[k] += here
            if here[2] > here[1] and within < room:
                torch.gt(bits_C, low, out=mask_C).bitwise_and_(bits_C < high)
                some_C = torch.masked_select(bits_C, mask_C)[: room - within]
                found[k].append(some_C.cpu().numpy().view(np.uint32))
    return counts, [np.concatenate(parts) for parts in found]


def nth_equal(inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
    """How many elements of delta_k, up to ``number``, have these bits, and where the last of so many is."""
    many = 0
    for chunk in chunks_of(Inputs((inputs.theta[model],), inputs.base), 2):
        (equal_C,) = scratch.rows(1, chunk.size, chunk.device, torch.bool)
        torch.eq(magnitude_bits(_delta(chunk, 0)), bits, out=equal_C)
        here = int(torch.count_nonzero(equal_C))
        if many + here >= number:
            return number, chunk.offset + int(equal_C.nonzero()[number - many - 1])
        many += here
    return many, -1


def _delta(chunk: Chunk, model: int) -> Tensor:
    delta_C, base_C = scratch.rows(2, chunk.size, chunk.device)
    delta_C.copy_(chunk.theta[model])
    return delta_C if chunk.base is None else delta_C.sub_(base_C.copy_(chunk.base))


def count_non_finite(values_C: Tensor) -> Tensor:
    """How many elements of a chunk are NaN or infinite, as a tensor without dimensions."""
    integers, exponent = EXPONENTS[values_C.dtype]
    (bits_C,) = scratch.rows(1, len(values_C), values_C.device, integers)
    (found_C,) = scratch.rows(1, len(values_C), values_C.device, torch.bool)
    torch.bitwise_and(values_C.view(integers), exponent, out=bits_C)
    return torch.count_nonzero(torch.eq(bits_C, exponent, out=found_C))
