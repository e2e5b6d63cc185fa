"""Philox4x32-10: random numbers from a key and a counter alone.

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np

from toolkit_kernels.numba_backend.bits import inlined, store_uint32

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_INCREMENTS = 0x9E3779B9, 0xBB67AE85  # added to the key from round to round
_MASK = np.uint64(0xFFFFFFFF)


@inlined
def _round(c0, c1, c2, c3, k0, k1):
    first = np.uint64(c0) * _MULTIPLIERS[0]
    second = np.uint64(c2) * _MULTIPLIERS[1]
    return (
        np.uint32(np.uint32(second >> np.uint64(32)) ^ c1 ^ k0),
        np.uint32(second & _MASK),
        np.uint32(np.uint32(first >> np.uint64(32)) ^ c3 ^ k1),
        np.uint32(first & _MASK),
    )


@inlined
def _key_of_round(key, increment, number):
    return np.uint32((key + number * increment) & 0xFFFFFFFF)


@inlined
def random_words(counter, c2, c3, key0, key1, number, to):
    """Write 4 * number words of 32 bits: those of the counters (low, high of counter + i, c2, c3), i = 0, 1, ..."""
    for i in range(number):
        low = np.uint64(counter + i)
        a, b = np.uint32(low & _MASK), np.uint32(low >> np.uint64(32))
        c, d = np.uint32(c2), np.uint32(c3)
        for j in range(10):
            k0, k1 = _key_of_round(key0, _INCREMENTS[0], j), _key_of_round(key1, _INCREMENTS[1], j)
            a, b, c, d = _round(a, b, c, d, k0, k1)
        store_uint32(to, 4 * i, a)
        store_uint32(to, 4 * i + 1, b)
        store_uint32(to, 4 * i + 2, c)
        store_uint32(to, 4 * i + 3, d)


def philox(counter, c2, c3, key0, key1, number, to):
    """random_words() as a function of its own, for tests against the known answers."""
    random_words(counter, c2, c3, key0, key1, number, to)
    return np.int64(0)
