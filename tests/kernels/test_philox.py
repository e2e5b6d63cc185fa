"""Philox against the known answers of its authors, and the ways to ask for a part of the stream."""

import numpy as np
import pytest
import torch

from toolkit_kernels.philox import key_of, philox_4x32, random_words
from toolkit_kernels.torch_backend import masks

# Random123, tests/kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox_4x32([np.array([word], dtype=np.uint64) for word in counter], key)
    assert tuple(int(word[0]) for word in words) == answer


def test_a_word_belongs_to_its_position():
    """Word i is word i % 4 of the counter (i // 4 low, i // 4 high, stream, 0)."""
    key, stream = (3, 4), 0xFFFFFFFF
    for i in (0, 1, 5, 4 * 2**32 - 1, 4 * 2**32 + 2, 2**62 + 3):
        counter = [i // 4 % 2**32, i // 4 >> 32, stream, 0]
        words = philox_4x32([np.array([word], dtype=np.uint64) for word in counter], key)
        assert random_words(key, stream, i, 1).tolist() == [int(words[i % 4][0])]


def test_any_part_of_the_stream():
    whole = random_words((7, 8), 1, 2**34 - 50, 101)
    assert whole.dtype == np.uint32
    for start, size in ((0, 101), (1, 3), (2, 0), (49, 52), (100, 1)):
        part = random_words((7, 8), 1, 2**34 - 50 + start, size)
        assert part.tolist() == whole[start : start + size].tolist()


def test_streams_and_keys_differ():
    """Of two independent rows of 1,000 words, none agrees in place: a chance of 2e-7 for it to fail."""
    rows = [
        random_words(key, stream, 0, 1_000) for key in ((0, 0), (1, 0), (0, 1)) for stream in (0, 1, 2**31)
    ]
    for i, row in enumerate(rows):
        for other in rows[i + 1 :]:
            assert not np.any(row == other)


@pytest.mark.parametrize("start", [0, 1024, 2**34 - 2048, 2**34, 2**60])
@pytest.mark.parametrize("size", [0, 1, 4, 5, 1023, 16384])
@torch.inference_mode()
def test_torch_counts_alike(start, size):
    words = masks.random_words((0xFFFFFFFF, 0x80000000), 0xFFFFFFFF, start, size, torch.device("cpu"))
    assert words.tolist() == random_words((0xFFFFFFFF, 0x80000000), 0xFFFFFFFF, start, size).tolist()


def test_a_key_is_for_ever():
    """Written down: a merge that is repeated years later draws the same masks."""
    assert key_of(0, "model.embed_tokens.weight") == (588277111, 576215505)
    assert key_of(42, "lm_head.weight") == (3591731233, 2718635145)
    names = [key_of(seed, name) for seed in (0, 1, -1, 11, 2**70) for name in ("", "a", "1:a", "\u00e9")]
    assert len(set(names)) == len(names)
    assert all(0 <= word < 2**32 for key in names for word in key)
