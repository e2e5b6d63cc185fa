"""Batches as tensors. The only module of the package that imports torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from toolkit.data.columns import IGNORED


class Collator:
    """Makes a batch of rows: pads on the right, masks by length (a pad token that is also EOS stays trained
    where it is EOS).

    Args:
        pad_token_id: fills ``input_ids``; never trained and never attended to.
        task: "causal-lm" (labels are token ids) or "sequence-classification" (labels are class numbers).
        packing: leave the attention mask out and give ``position_ids``, which begin again with each row of a
            packed sequence. Needs ``use_cache=False`` in the model: with a cache transformers ignores the
            borders.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
        flatten: with packing, join the batch into one row [1, B*T]: flash attention isolates packed rows only
            then.
    """

    def __init__(
        self,
        pad_token_id: int,
        task: str = "causal-lm",
        packing: bool = False,
        pad_to_multiple_of: int = 1,
        flatten: bool = False,
    ) -> None:
        if task not in ("causal-lm", "sequence-classification"):
            raise ValueError(f"unknown task {task!r}")
        if packing and task != "causal-lm":
            raise ValueError("packing is for causal-lm: a packed sequence has no single class")
        if pad_to_multiple_of < 1:
            raise ValueError("pad_to_multiple_of must be at least 1")
        self.pad_token_id = pad_token_id
        self.task = task
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.flatten = flatten and packing

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch.

        Args:
            rows: each with input_ids [T_i] and labels ([T_i], or a class number); with packing also
                position_ids [T_i] or seq_lengths (lengths of the rows in it).

        Returns:
            input_ids int64 [B, T]; labels int64 [B, T] or [B]; attention_mask int64 [B, T], or with packing
            position_ids int64 [B, T]. T is the longest row, rounded up.

        Raises:
            ValueError: with packing, a row that does not say where its parts begin.
        """
        if self.flatten:
            rows = [_joined(rows)]
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        width = max(len(row) for row in ids)
        width += -width % self.pad_to_multiple_of
        batch = {"input_ids": _padded(ids, width, self.pad_token_id)}
        if self.task == "sequence-classification":
            batch["labels"] = torch.tensor([int(row["labels"]) for row in rows], dtype=torch.int64)
        else:
            labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
            batch["labels"] = _padded(labels, width, IGNORED)
        if not self.packing:
            batch["attention_mask"] = _padded([torch.ones_like(row) for row in ids], width, 0)
            return batch
        # A pad at position 0 follows another position 0, or a last position that is not -1: every pad is a
        # row of its own.
        batch["position_ids"] = _padded([_positions(row) for row in rows], width, 0)
        return batch


def _padded(rows: Sequence[torch.Tensor], width: int, value: int) -> torch.Tensor:
    batch = torch.full((len(rows), width), value, dtype=torch.int64)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = row
    return batch


def _positions(row: Mapping[str, Any]) -> torch.Tensor:
    if row.get("position_ids") is not None:
        return torch.as_tensor(row["position_ids"], dtype=torch.int64)
    if row.get("seq_lengths") is None:
        raise ValueError(
            "a row of a packed batch has neither position_ids nor seq_lengths, so its parts would see each "
            "other; "
            "prepare the data with packing, and keep its columns (remove_unused_columns=False)"
        )
    return torch.cat([torch.arange(int(length)) for length in row["seq_lengths"]])


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {
        name: [token for row in rows for token in row[name]] for name in ("input_ids", "labels")
    }
    joined["position_ids"] = torch.cat([_positions(row) for row in rows])
    return joined
