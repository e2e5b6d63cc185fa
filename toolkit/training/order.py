"""The order of the training rows: a function of seed and epoch alone, so that a resumed run sees the same rows.

transformers' own samplers draw from the global generator at the start of each epoch. After a resume in mid-epoch
that draw cannot be repeated (length grouping) or depends on what else has drawn (shuffling).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

GROUPED_STEPS = 50
"""Steps whose rows are sorted together under length grouping: few enough to stay random, enough to save padding."""


class EpochOrder(Sampler[int]):
    """All row numbers once an epoch, shuffled by (seed, epoch).

    Args:
        num_rows: rows of the training data.
        seed: of the participant.
        lengths: tokens of each row; given, rows of similar length come together, the longest batch first, so that
            a batch too large for memory fails at the first step.
        rows_per_step: rows of one optimizer step on all devices.
    """

    def __init__(
        self, num_rows: int, seed: int, *, lengths: Sequence[int] | None = None, rows_per_step: int = 1
    ) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._rows_per_step = rows_per_step
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        generator = np.random.Generator(
            np.random.Philox(key=np.array([self._seed, self._epoch], dtype=np.uint64))
        )
        order = generator.permutation(self._num_rows)
        if self._lengths is not None:
            order = self._group(order, self._lengths, generator)
        return iter(order.tolist())

    def _group(self, order: np.ndarray, lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        size = self._rows_per_step
        steps: list[np.ndarray] = []
        for start in range(0, len(order), GROUPED_STEPS * size):
            window = order[start : start + GROUPED_STEPS * size]
            window = window[np.argsort(-lengths[window], kind="stable")]
            steps += [window[at : at + size] for at in range(0, len(window), size)]
        # An incomplete step stays last: in the middle it would shift the borders of all later steps.
        tail = [steps.pop()] if len(steps[-1]) < size and len(steps) > 1 else []
        longest = max(range(len(steps)), key=lambda i: int(lengths[steps[i]].max()))
        first = steps.pop(longest)
        shuffled = [steps[i] for i in generator.permutation(len(steps))]
        return np.concatenate([first, *shuffled, *tail])
