"""Which elements of a delta stay: thresholds over magnitudes, and random bits by position.

Legend: C elements of a chunk, Q = ceil(C / 4) counters of Philox.
"""

import torch
from torch import Tensor

from toolkit_kernels.philox import MULTIPLIERS, round_keys
from toolkit_kernels.rules import Keep, Threshold
from toolkit_kernels.torch_backend.memory import scratch

WORD = 0xFFFFFFFF
LARGEST_BITS = 0x7FFFFFFF


def magnitude_bits(delta_C: Tensor) -> Tensor:
    """[C] int32: bit patterns of |delta| rounded to float32; in the thread's scratch."""
    (float32_C,) = scratch.rows(1, len(delta_C), delta_C.device, torch.float32)
    return float32_C.copy_(delta_C).view(torch.int32).bitwise_and_(LARGEST_BITS)


def kept(keep: Keep, delta_C: Tensor, start: int) -> Tensor | None:
    """[C] int64: all bits set where an element of a delta stays, none where it becomes zero; None where all stay.

    Integers in place of bools: the sign of a difference, shifted over the whole word, is the mask, and ``&`` puts it on
    the bits of a float64. torch vectorises that, and ``masked_fill_`` not.

    Args:
        keep: which elements stay.
        delta_C: float64.
        start: index, in the whole tensor, of the first element; a multiple of 4.
    """
    if keep.among is None and keep.outside is None and keep.probability is None:
        return None
    size, device = len(delta_C), delta_C.device
    kept_C, part_C = scratch.rows(2, size, device, torch.int32)
    kept_C.fill_(-1)
    if keep.among is not None:
        kept_C.bitwise_and_(_is_below(keep.among, magnitude_bits(delta_C), start, part_C).bitwise_not_())
    if keep.outside is not None:
        kept_C.bitwise_and_(_is_below(keep.outside, magnitude_bits(delta_C), start, part_C))
    if keep.probability is not None:
        words_C = random_words(keep.key, keep.stream, start, size, device)
        words_C.sub_(int(keep.probability * 2.0**32)).bitwise_right_shift_(63)
        kept_C.bitwise_and_(part_C.copy_(words_C))
    (wide_C,) = scratch.rows(1, size, device, torch.int64)
    return wide_C.copy_(kept_C)


def _is_below(threshold: Threshold, bits_C: Tensor, start: int, out_C: Tensor) -> Tensor:
    """-1 for the elements that are not in the set of largest, 0 for those in it."""
    torch.sub(bits_C, min(threshold.bits, LARGEST_BITS), out=out_C)
    num_early = min(max(threshold.last - start + 1, 0), len(bits_C))
    out_C[num_early:].sub_(1)  # past the last index, those that equal the threshold are below it
    return out_C.bitwise_right_shift_(31)


def random_words(key: tuple[int, int], stream: int, start: int, size: int, device: torch.device) -> Tensor:
    """[C] int64: the words of 32 bits of ``philox.random_words``; in the thread's scratch.

    Four rows of counters in two pairs, ``even`` = (c_0, c_2) and ``odd`` = (c_1, c_3). A product of 64 bits wraps into
    int64; its halves are the same bits.
    """
    num_counters = -(-size // 4)
    memory = scratch.matrix(10, num_counters, device, torch.int64)
    even_2Q, odd_2Q, product_2Q, words_Q4 = memory[:2], memory[2:4], memory[4:6], memory[6:].view(-1, 4)
    (c_0, c_2), (c_1, c_3), (product_1, product_0) = even_2Q.unbind(), odd_2Q.unbind(), product_2Q.unbind()
    torch.arange(start // 4, start // 4 + num_counters, out=c_0)
    torch.bitwise_right_shift(c_0, 32, out=c_1)
    c_0.bitwise_and_(WORD)
    c_2.fill_(stream)
    c_3.zero_()
    for k_0, k_1 in round_keys(key):
        torch.mul(c_2, MULTIPLIERS[1], out=product_1)
        torch.mul(c_0, MULTIPLIERS[0], out=product_0)
        torch.bitwise_right_shift(product_2Q, 32, out=even_2Q)
        even_2Q.bitwise_xor_(odd_2Q).bitwise_and_(WORD)
        c_0.bitwise_xor_(k_0)
        c_2.bitwise_xor_(k_1)
        torch.bitwise_and(product_2Q, WORD, out=odd_2Q)
    pairs_Q22 = words_Q4.view(-1, 2, 2)
    pairs_Q22[:, :, 0].copy_(even_2Q.t())
    pairs_Q22[:, :, 1].copy_(odd_2Q.t())
    return words_Q4.view(-1)[:size]
