"""Random bits by position: Philox4x32-10, a generator without state, so that masks depend on no thread and no chunk.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
# What is added to the two words of the key after each round.
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# A word of 32 bits, and its width.
WORD, WIDTH = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = NDArray[np.uint64]


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The two words of 32 bits that stand for a seed and the name of a tensor: blake2b of ``seed:name``."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    """The two words that each of the ten rounds mixes in."""
    step_0, step_1 = KEY_STEPS
    return [((key[0] + r * step_0) % 2**32, (key[1] + r * step_1) % 2**32) for r in range(ROUNDS)]


def philox_4x32(counter: Sequence[Words], key: tuple[int, int]) -> tuple[Words, ...]:
    """Four words of 32 bits for each counter.

    One round: (c_0, c_1, c_2, c_3) becomes (high(M_1 c_2) ^ c_1 ^ k_0, low(M_1 c_2), high(M_0 c_0) ^ c_3 ^ k_1,
    low(M_0 c_0)), high and low being halves of a product of 64 bits.

    Args:
        counter: four arrays [N] of words below 2**32, lowest first.
        key: two words below 2**32.

    Returns:
        Four arrays [N] of words below 2**32.
    """
    c_0, c_1, c_2, c_3 = counter
    for k_0, k_1 in round_keys(key):
        product_0, product_1 = c_0 * np.uint64(MULTIPLIERS[0]), c_2 * np.uint64(MULTIPLIERS[1])
        c_0, c_2 = (product_1 >> WIDTH) ^ c_1 ^ np.uint64(k_0), (product_0 >> WIDTH) ^ c_3 ^ np.uint64(k_1)
        c_1, c_3 = product_1 & WORD, product_0 & WORD
    return c_0, c_1, c_2, c_3


def random_words(key: tuple[int, int], stream: int, start: int, size: int) -> NDArray[np.uint32]:
    """The random words of the elements ``start`` to ``start + size`` of a tensor.

    Word i is word i % 4 of Philox with the counter (i // 4 low, i // 4 high, stream, 0).

    Args:
        key: from ``key_of``.
        stream: below 2**32; tells the models of one merge apart.
        start: index of the first element, below 2**63.
        size: how many.

    Returns:
        [size] words of 32 bits.
    """
    index = np.arange(start // 4, (start + size + 3) // 4, dtype=np.uint64)
    counter = (index & WORD, index >> WIDTH, np.full_like(index, stream), np.zeros_like(index))
    words = np.stack(philox_4x32(counter, key), axis=1).reshape(-1)
    return words[start % 4 : start % 4 + size].astype(np.uint32)
