"""Labelled texts as tokens and class numbers, for sequence classification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.data.examples import Labelled
from toolkit.data.overlong import OverlongCounts, refuse
from toolkit.errors import DataError


@dataclass(frozen=True, slots=True)
class Classified:
    """One text: token ids int32 [T], its class number, and the number of the example."""

    ids: np.ndarray
    label: int
    index: int

    def __len__(self) -> int:
        return len(self.ids)


def label_names_of(examples: Sequence[Labelled]) -> list[str]:
    """The classes of the training split, sorted by name (numbers by value).

    Raises:
        DataError: fewer than two classes.
    """
    names = {example.label for example in examples}
    if len(names) < 2:
        raise DataError(
            f"the training data has {len(names)} class{'es' if len(names) != 1 else ''}"
            f"{' (' + ', '.join(names) + ')' if names else ''}; at least two are needed"
        )
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def classify(
    examples: Sequence[Labelled],
    label_names: Sequence[str],
    tokenizer: Any,
    *,
    policy: str,
    max_length: int,
    where: Callable[[int], str],
    batch_rows: int = 1000,
) -> tuple[list[Classified], list[int], OverlongCounts]:
    """Tokenise texts with the tokenizer's special tokens and apply the overlong policy.

    Args:
        examples: the rows.
        label_names: the classes; a class's number is its place here.
        tokenizer: a transformers tokenizer.
        policy: "drop", "truncate" (the special tokens at the end stay) or "error".
        max_length: longest text in tokens, special tokens included.
        where: gives the place of example ``index`` for messages.
        batch_rows: texts tokenised at once.

    Returns:
        (rows, length of every text before the policy, counts).

    Raises:
        DataError: a class that the training data does not have; policy "split"; texts too long under "error".
    """
    if policy == "split":
        raise DataError(
            "--overlong split cannot be used for sequence classification: a part of a text need not have "
            "its class",
            hint="use --overlong truncate or drop",
        )
    numbers = {name: number for number, name in enumerate(label_names)}
    rows: list[Classified] = []
    lengths: list[int] = []
    counts = OverlongCounts(policy, max_length)
    for start in range(0, len(examples), batch_rows):
        batch = examples[start : start + batch_rows]
        for offset, ids in enumerate(_tokenise(tokenizer, batch)):
            index = start + offset
            if batch[offset].label not in numbers:
                raise DataError(
                    f"{where(index)}: the label {batch[offset].label!r} is not in the training data",
                    hint="labels of the training data: "
                    f"{', '.join(label_names[:20])}{', ...' if len(label_names) > 20 else ''}",
                )
            lengths.append(len(ids))
            if len(ids) > max_length:
                counts.note_over(len(ids), index)
                if policy == "drop":
                    counts.num_rows_dropped += 1
                    continue
                if policy == "error":
                    continue
                counts.num_rows_cut += 1
                ids = _tokenise(tokenizer, [batch[offset]], truncation=True, max_length=max_length)[0]
            rows.append(Classified(np.asarray(ids, dtype=np.int32), numbers[batch[offset].label], index))
    refuse(counts, where)
    return rows, lengths, counts


def _tokenise(tokenizer: Any, examples: Sequence[Labelled], **options: Any) -> list[list[int]]:
    texts = [example.text for example in examples]
    return tokenizer(
        texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
    ).input_ids
