"""Several short rows in one sequence (best-fit decreasing), which do not see each other.

A packed row has ``position_ids`` that begin again at 0 with each of its rows. transformers reads the borders
from them when it gets no attention mask and no cache (``masking_utils.find_packed_sequence_indices``), for
eager, sdpa and flex_attention at any batch size. Flash attention does so only for a batch of one row:
:class:`~toolkit.data.collate.Collator` can join the batch into one for it.
"""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few sequences as best-fit decreasing finds.

    Args:
        lengths: length of each row in tokens; every one at most ``capacity``.
        capacity: longest packed sequence in tokens.

    Returns:
        The rows of each packed sequence, by number. Deterministic; rows in a sequence and sequences are in
        order of their first row.

    Raises:
        ValueError: a row is longer than ``capacity``.
    """
    too_long = [n for n, length in enumerate(lengths) if length > capacity]
    if too_long:
        raise ValueError(
            f"row {too_long[0]} has {lengths[too_long[0]]} tokens and a packed sequence holds {capacity}"
        )
    bins: list[list[int]] = []
    # Bins by free space: a sorted list of (free, bin number) finds the tightest one that still fits.
    free: list[tuple[int, int]] = []
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect.bisect_left(free, (lengths[row], -1))
        if place == len(free):
            bins.append([row])
            space, number = capacity - lengths[row], len(bins) - 1
        else:
            space, number = free.pop(place)
            bins[number].append(row)
            space -= lengths[row]
        if space:
            bisect.insort(free, (space, number))
    for rows in bins:
        rows.sort()
    return sorted(bins)
