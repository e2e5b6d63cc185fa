"""Rendered rows as token ids with a mask of the trained tokens.

Whole rows are tokenised in batches; the spans become tokens through the tokenizer's character offsets. Only a
row in which a token straddles the border between prompt and answer is tokenised piece by piece, so that the
prompt has the very tokens that it has at inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.data.render import Rendered
from toolkit.data.special import SpecialTokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens.

    Args:
        ids: token ids, int32 [T].
        trained: bool [T], True where the token is a target of the loss. The first token never is: nothing
            predicts it.
        index: number of the example that it is from.
    """

    ids: np.ndarray
    trained: np.ndarray
    index: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())


@dataclass
class EncodeCounts:
    """What tokenising had to repair or could not.

    num_straddling counts rows tokenised piece by piece, num_merged those in which that would have changed the
    text.
    """

    num_straddling: int = 0
    num_merged: int = 0
    num_double_bos: int = 0


class Encoder:
    """Tokenises rendered rows for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer, fast or not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.counts = EncodeCounts()
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        # Tokens that can end an answer: EOS, and what a template ends a turn with.
        self.turn_end_ids = SpecialTokens(tokenizer).ids
        self.adds_bos = self.bos_id is not None and tokenizer("a").input_ids[:1] == [self.bos_id]

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Return the rows as tokens, in order."""
        if not rows:
            return []
        if not self.is_fast:
            return [self._finish(row, *self._piecewise(row)) for row in rows]
        encoding = self.tokenizer(
            [row.text for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encoded = []
        for row, ids, offsets in zip(rows, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            trained = None
            if row.trains_all:
                trained = np.ones(len(ids), dtype=bool)
            elif ids:
                trained = self._trained(row, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
            if trained is None:
                encoded.append(self._finish(row, *self._straddled(row, ids, offsets)))
            else:
                encoded.append(self._finish(row, list(ids), trained))
        return encoded

    @staticmethod
    def _trained(row: Rendered, offsets: np.ndarray) -> np.ndarray | None:
        """The mask of a row, or None where a token reaches over the beginning of a span. ``offsets``: int64
        [T, 2]."""
        begins, ends = offsets[:, 0], offsets[:, 1]
        trained = np.zeros(len(offsets), dtype=bool)
        for start, end in row.spans:
            inside = (ends > start) & (begins < end)
            if not inside.any():
                return None
            first = int(inside.argmax())
            # Offsets may leave white space out: a hole that covers the border could belong to either side.
            before = int(ends[first - 1]) if first else start
            if begins[first] < start or (before < start and row.text[before:start].isspace()):
                return None
            trained |= inside
        return trained

    def _straddled(self, row: Rendered, ids: Sequence[int], offsets: Any) -> tuple[list[int], np.ndarray]:
        pieces, trained = self._piecewise(row)
        if pieces == list(ids) or self.tokenizer.decode(pieces) == self.tokenizer.decode(ids):
            self.counts.num_straddling += pieces != list(ids)
            return pieces, trained
        # A tokenizer that puts a space before every text it is given: its pieces do not join to the whole.
        self.counts.num_merged += 1
        table = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        trained = np.zeros(len(table), dtype=bool)
        for start, end in row.spans:
            trained |= (table[:, 1] > start) & (table[:, 0] < end)
        return list(ids), trained

    def _piecewise(self, row: Rendered) -> tuple[list[int], np.ndarray]:
        ids: list[int] = []
        flags: list[bool] = []
        position = 0
        for start, end in (*row.spans, (len(row.text), len(row.text))):
            for piece, is_trained in (
                (row.text[position:start], row.trains_all),
                (row.text[start:end], True),
            ):
                if piece:
                    part = self.tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
                    ids += part
                    flags += [is_trained] * len(part)
            position = end
        return ids, np.asarray(flags, dtype=bool)

    def _finish(self, row: Rendered, ids: list[int], trained: np.ndarray) -> Encoded:
        """Put BOS and EOS where they belong, once each."""
        flags = trained.tolist()
        while len(ids) > 1 and self.bos_id is not None and ids[0] == ids[1] == self.bos_id:
            ids, flags = ids[1:], flags[1:]
            self.counts.num_double_bos += 1
        if not row.is_template and self.adds_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            ids, flags = [self.bos_id, *ids], [False, *flags]
        if row.ends_open and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids, flags = [*ids, self.eos_id], [*flags, True]
        mask = np.asarray(flags, dtype=bool)
        mask[:1] = False
        return Encoded(np.asarray(ids, dtype=np.int32), mask, row.index)
