"""Rows that are longer than --max-length: left out, cut, split between turns, or an error. Every loss is
counted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from toolkit.data.encode import Encoded
from toolkit.data.examples import Conversation, Example, PlainText
from toolkit.errors import DataError

NUM_WORST_SHOWN = 5
EncodeExample = Callable[[Example, int], list[Encoded]]


@dataclass
class OverlongCounts:
    """What the policy did to the rows of one split.

    num_rows_over counts rows of the source with a sequence over max_length; the next three what became of
    them; num_pieces the sequences that split rows became. Answer tokens are trained tokens. ``worst``: length
    in tokens and number of the longest rows.
    """

    policy: str = "error"
    max_length: int = 0
    num_rows_over: int = 0
    num_rows_dropped: int = 0
    num_rows_cut: int = 0
    num_rows_split: int = 0
    num_pieces: int = 0
    num_answer_tokens: int = 0
    num_answer_tokens_lost: int = 0
    worst: list[tuple[int, int]] = field(default_factory=list)

    def note_over(self, length: int, index: int) -> None:
        """Count a row that is too long, and keep it in mind if it is among the longest."""
        self.num_rows_over += 1
        self.worst = sorted([*self.worst, (length, index)], key=lambda w: (-w[0], w[1]))[:NUM_WORST_SHOWN]


def refuse(counts: OverlongCounts, where: Callable[[int], str]) -> None:
    """Raise a DataError that shows the longest rows, if the policy is "error" and there were any.

    Args:
        counts: of a whole split.
        where: gives the place of example ``index``.
    """
    if counts.policy != "error" or not counts.num_rows_over:
        return
    worst = "\n".join(f"  {where(index)}: {length} tokens" for length, index in counts.worst)
    rows = "1 row is" if counts.num_rows_over == 1 else f"{counts.num_rows_over} rows are"
    raise DataError(
        f"{rows} longer than --max-length {counts.max_length}; the longest:\n{worst}",
        hint=f"--max-length {counts.worst[0][0]} keeps them whole; --overlong drop, truncate or split says "
        "what to do",
    )


def overlong_facts(counts: OverlongCounts, where: Callable[[int], str]) -> dict[str, Any]:
    """The counts as JSON values, the longest rows by their place."""
    return {**asdict(counts), "worst": [[where(index), length] for length, index in counts.worst]}


class OverlongPolicy:
    """Applies one policy to the rows of one split.

    Args:
        policy: "drop", "truncate", "split" or "error".
        max_length: longest sequence in tokens.
        encode_example: renders and tokenises a part of an example again, for "split".
        bos_id: the token that begins every piece of a text, where the text began with it.
    """

    def __init__(
        self,
        policy: str,
        max_length: int,
        encode_example: EncodeExample,
        bos_id: int | None,
    ) -> None:
        self.max_length = max_length
        self.bos_id = bos_id
        self.encode_example = encode_example
        self.counts = OverlongCounts(policy, max_length)

    def apply(self, example: Example, rows: Sequence[Encoded]) -> list[Encoded]:
        """Return what is kept of the sequences of one example. With "error" they are noted for
        :func:`refuse`."""
        counts = self.counts
        counts.num_answer_tokens += sum(row.num_trained for row in rows)
        longest = max((len(row) for row in rows), default=0)
        if longest <= self.max_length:
            return list(rows)
        counts.note_over(longest, rows[0].index)
        if counts.policy == "error":
            return list(rows)
        if counts.policy == "split":
            return self._split(example, rows)
        kept, was_cut = [], False
        for row in rows:
            if len(row) <= self.max_length:
                kept.append(row)
                continue
            part = Encoded(row.ids[: self.max_length], row.trained[: self.max_length], row.index)
            if counts.policy == "drop" or not part.num_trained:
                counts.num_answer_tokens_lost += row.num_trained
            else:
                counts.num_answer_tokens_lost += row.num_trained - part.num_trained
                kept.append(part)
                was_cut = True
        if was_cut or kept:
            counts.num_rows_cut += 1
        else:
            counts.num_rows_dropped += 1
        return kept

    def _split(self, example: Example, rows: Sequence[Encoded]) -> list[Encoded]:
        counts = self.counts
        if isinstance(example, PlainText):
            pieces = [piece for row in rows for piece in self._text_pieces(row)]
        elif isinstance(example, Conversation) and not example.is_plain:
            pieces = self._conversation_pieces(example, rows[0].index)
        else:
            pieces = [row for row in rows if len(row) <= self.max_length]
        before, after = sum(row.num_trained for row in rows), sum(piece.num_trained for piece in pieces)
        counts.num_answer_tokens_lost += max(0, before - after)
        if pieces:
            counts.num_rows_split += 1
            counts.num_pieces += len(pieces)
        else:
            counts.num_rows_dropped += 1
        return pieces

    def _text_pieces(self, row: Encoded) -> list[Encoded]:
        """Windows of max_length tokens; the first token of the row (BOS, if there is one) begins every
        piece."""
        has_bos = self.bos_id is not None and int(row.ids[0]) == self.bos_id
        head = row.ids[: int(has_bos)]
        body = row.ids[len(head) :]
        step = self.max_length - len(head)
        pieces = []
        for start in range(0, len(body), step):
            ids = np.concatenate([head, body[start : start + step]])
            if len(ids) < 2:
                # A single token has nothing that predicts it.
                continue
            trained = np.ones(len(ids), dtype=bool)
            trained[0] = False
            pieces.append(Encoded(ids, trained, row.index))
        return pieces

    def _conversation_pieces(self, example: Conversation, index: int) -> list[Encoded]:
        """Runs of whole exchanges, as many as fit, each after the system prompt. An exchange that is too long
        alone is left out."""
        head = [m for m in example.messages if m.role in ("system", "developer")]
        exchanges: list[list] = []
        for message in example.messages:
            if message.role in ("system", "developer"):
                continue
            if message.role == "user" and (
                not exchanges or any(m.role == "assistant" for m in exchanges[-1])
            ):
                exchanges.append([message])
            elif exchanges:
                exchanges[-1].append(message)
            else:
                exchanges.append([message])

        def encoded(first: int, last: int) -> list[Encoded]:
            turns = [m for exchange in exchanges[first:last] for m in exchange]
            return self.encode_example(Conversation((*head, *turns), example.tools), index)

        pieces: list[Encoded] = []
        first = 0
        while first < len(exchanges):
            fitting: list[Encoded] = []
            last = first + 1
            while last <= len(exchanges):
                rows = encoded(first, last)
                if max((len(row) for row in rows), default=0) > self.max_length:
                    break
                fitting, last = rows, last + 1
            pieces += fitting
            first = max(last - 1, first + 1)
        return pieces
