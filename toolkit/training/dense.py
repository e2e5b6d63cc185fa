"""Batches with little padding: the rows of an optimizer step, laid out anew.

A step trains the same rows with the same loss whatever its micro-batches are. So its rows are taken together, sorted by
length and cut into micro-batches by what each costs: rows padded to the longest of them, or one after the other in one
sequence ("flat"), where they do not see each other (``position_ids`` begin again with each row; see
``toolkit/data/packing.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolkit.data.columns import IGNORED
from toolkit.training.row_attention import Rows

FIELDS = ("input_ids", "labels", "position_ids")
MAX_ROWS_TOGETHER = 64
"""Rows that are planned together; more would make planning itself slow."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a micro-batch costs, in tokens' worth of matrix products.

    Attributes:
        pair: attention between two positions.
        batch: a micro-batch, however small: starting its kernels, reading the weights.
        capacity: positions that a micro-batch may have: what the largest batch would have had anyway.
        flat: positions that rows in one sequence may have; 0 where the model lets such rows see each other.
        is_row_wise: attention in one sequence is computed row by row.
    """

    pair: float
    batch: float
    capacity: int
    flat: int
    is_row_wise: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A micro-batch: rows of the step by number, in one sequence or padded."""

    rows: tuple[int, ...]
    is_flat: bool


def plan_groups(lengths: Sequence[int], costs: Costs) -> list[Group]:
    """Cut the rows of a step into micro-batches at the least cost.

    The rows are sorted, longest first, and cut where the sum over the micro-batches is least (dynamic programming over
    the cuts, exact for rows in this order).

    Args:
        lengths: of the rows in tokens, each at most ``costs.capacity``.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[Group] = []
    for begin in range(0, len(order), MAX_ROWS_TOGETHER):
        groups += _cut(order[begin : begin + MAX_ROWS_TOGETHER], lengths, costs)
    return groups


def _cut(order: Sequence[int], lengths: Sequence[int], costs: Costs) -> list[Group]:
    best: list[tuple[float, int, bool]] = [
        (0.0, 0, False)
    ]  # cost of the rows before i, where the last group begins
    for end in range(1, len(order) + 1):
        choice = (float("inf"), 0, False)
        num_tokens = 0
        for begin in range(end - 1, -1, -1):
            num_tokens += lengths[order[begin]]
            longest, num_rows = lengths[order[begin]], end - begin
            padded = num_rows * longest
            before = best[begin][0] + costs.batch
            if padded <= costs.capacity or num_rows == 1:
                cost = before + padded + costs.pair * padded * longest
                choice = min(choice, (cost, begin, False))
            if num_rows > 1 and num_tokens <= min(costs.flat, costs.capacity):
                pairs = padded * longest if costs.is_row_wise else num_tokens**2
                cost = before + num_tokens + costs.pair * pairs
                choice = min(choice, (cost, begin, True))
        best.append(choice)
    groups, end = [], len(order)
    while end:
        _, begin, is_flat = best[end]
        groups.append(Group(tuple(order[begin:end]), is_flat))
        end = begin
    return groups[::-1]


class Layout:
    """How the flat batch of a :class:`DenseCollator` is cut into micro-batches. Travels beside its tensors.

    Args:
        lengths: of the rows, in the order in which they lie in the batch.
    """

    def __init__(
        self, lengths: Sequence[int], groups: Sequence[Group], *, pad_token_id: int, tells_rows: bool
    ) -> None:
        self._tells_rows = tells_rows
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._groups = groups
        self._pad_token_id = pad_token_id

    def micro_batches(self, batch: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """The micro-batches of ``batch`` (``input_ids``, ``labels``, ``position_ids``, each [1, S]); those in one
        sequence with their ``rows`` where attention asks for them."""
        return [self._micro_batch(batch, group) for group in self._groups]

    def _micro_batch(self, batch: Mapping[str, torch.Tensor], group: Group) -> dict[str, Any]:
        spans = [slice(self._starts[row], self._starts[row + 1]) for row in group.rows]
        parts = {name: [batch[name][0, span] for span in spans] for name in FIELDS}
        lengths = [len(row) for row in parts["input_ids"]]
        if group.is_flat:
            flat: dict[str, Any] = {name: torch.cat(rows)[None] for name, rows in parts.items()}
            return flat | ({"rows": Rows(lengths, batch["input_ids"].device)} if self._tells_rows else {})
        if min(lengths) == max(lengths):  # nothing is padded, and without a mask attention has a faster way
            return {name: torch.stack(rows) for name, rows in parts.items()}
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
            for (name, rows), value in zip(parts.items(), (self._pad_token_id, IGNORED, 0), strict=True)
        }
        del padded["position_ids"]
        positions = torch.arange(max(lengths), device=padded["input_ids"].device)
        limits = torch.tensor(lengths, device=positions.device)
        return padded | {"attention_mask": (positions[None] < limits[:, None]).long()}


class DenseCollator:
    """Makes one flat batch of the rows of a step, with the layout of its micro-batches.

    Args:
        pad_token_id: fills rows of padded micro-batches; never trained and never attended to.
        costs: by which the micro-batches are chosen.
        tells_rows: micro-batches in one sequence say where their rows begin
            (:mod:`toolkit.training.row_attention`).
    """

    def __init__(self, pad_token_id: int, costs: Costs, *, tells_rows: bool) -> None:
        self._tells_rows = tells_rows
        self._pad_token_id = pad_token_id
        self._costs = costs

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels`` and ``position_ids``, int64 [1, S], in the order of ``rows``, and their
        ``layout``. The first label of a row is never used: nothing comes before it."""
        lengths = [len(row["input_ids"]) for row in rows]
        labels = [np.array(row["labels"], dtype=np.int64) for row in rows]
        for row in labels:
            row[0] = IGNORED
        tensors = {
            "input_ids": [np.asarray(row["input_ids"], dtype=np.int64) for row in rows],
            "labels": labels,
            "position_ids": [np.arange(length) for length in lengths],
        }
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in tensors.items()
        }
        layout = Layout(
            lengths,
            plan_groups(lengths, self._costs),
            pad_token_id=self._pad_token_id,
            tells_rows=self._tells_rows,
        )
        return batch | {"layout": layout}
