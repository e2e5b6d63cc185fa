"""What a trial trained on, whatever its batches looked like: a digest that does not depend on the order of the rows.

A row is hashed by itself and the hashes are added up, so that arms that shuffle, pad or pack otherwise still agree
when they trained the same rows equally often.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

IGNORED = -100
_MODULUS = 1 << 64


class RowDigest:
    """Counts of the rows that were trained, and the sum of their hashes.

    Attributes:
        num_rows, num_tokens: without padding.
        num_trainable_tokens: tokens that something is learned from: those with a label, but for the first of a row,
            which nothing predicts.
        num_padded: positions of the batches, with padding.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_tokens = self.num_trainable_tokens = self.num_padded = 0
        self._ids = self._labels = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch of a collator: ``input_ids`` and ``labels`` [B, T], with an ``attention_mask`` [B, T], or with
        ``position_ids`` [B, T] that begin again at 0 with each row of a sequence, or with rows of full length."""
        self.num_padded += int(np.asarray(batch["input_ids"]).size)
        for ids, labels in rows_of(batch):
            trained = labels[1:] != IGNORED
            self.num_rows += 1
            self.num_tokens += len(ids)
            self.num_trainable_tokens += int(trained.sum())
            self._ids = (self._ids + _hash(ids)) % _MODULUS
            self._labels = (self._labels + _hash(np.where(trained, labels[1:], IGNORED))) % _MODULUS

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "num_trainable_tokens": self.num_trainable_tokens,
            "num_padded_tokens": self.num_padded,
            "token_digest": f"{self._ids:016x}",
            "label_digest": f"{self._labels:016x}",
        }


def rows_of(batch: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids [T_i] and labels [T_i] of each row in a batch, without padding."""
    ids_BT, labels_BT = np.asarray(batch["input_ids"]), np.asarray(batch["labels"])
    mask = batch.get("attention_mask")
    positions = batch.get("position_ids")
    for b in range(len(ids_BT)):
        ids, labels = ids_BT[b], labels_BT[b]
        if mask is not None:
            keep = np.asarray(mask[b]).astype(bool)
            yield ids[keep], labels[keep]
        elif positions is not None:
            starts = np.flatnonzero(np.asarray(positions[b]) == 0).tolist()
            for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                # A padding position is a row of its own, of one token without a label.
                if end - begin > 1 or labels[begin] != IGNORED:
                    yield ids[begin:end], labels[begin:end]
        else:
            yield ids, labels


def _hash(values: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(values.astype("<i8").tobytes(), digest_size=8).digest(), "little")
