"""Examples as encoded rows of a language model: rendering, tokenising and the overlong policy, in batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from toolkit.data.check import Lengths, SplitReport
from toolkit.data.encode import Encoded, Encoder
from toolkit.data.examples import Conversation, Example
from toolkit.data.overlong import OverlongPolicy, overlong_facts, refuse
from toolkit.data.render import Renderer

BATCH_ROWS = 1000
Where = Callable[[int], str]
Progress = Callable[[Iterable[int]], Iterable[int]]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    report: SplitReport,
    *,
    loss_on: str,
    max_length: int,
    overlong: str,
    where: Where,
    progress: Progress = iter,
) -> list[Encoded]:
    """Encode one split and fill in its report.

    Args:
        examples: conversations and texts.
        tokenizer: a transformers tokenizer.
        report: gets lengths, tokens and counts.
        loss_on: "assistant", "last-assistant", "completion" or "all".
        max_length: longest sequence in tokens.
        overlong: "drop", "truncate", "split" or "error".
        where: gives the place of example ``index`` for messages.
        progress: wraps the iteration over batches.

    Returns:
        rows with at least one trained token and at most ``max_length`` tokens.

    Raises:
        ModelError: no chat template; DataError: a row that cannot be rendered, or rows too long under
            "error".
    """
    renderer, encoder = Renderer(tokenizer, loss_on, where), Encoder(tokenizer)
    # Parts of a conversation are rendered apart from the whole, so that nothing is counted twice.
    part_renderer, part_encoder = Renderer(tokenizer, loss_on, where), Encoder(tokenizer)

    def encode_part(example: Example, index: int) -> list[Encoded]:
        return part_encoder.encode(part_renderer.render([example], index))

    policy = OverlongPolicy(overlong, max_length, encode_part, encoder.bos_id if encoder.adds_bos else None)
    rows: list[Encoded] = []
    lengths: list[int] = []
    for start in progress(range(0, len(examples), BATCH_ROWS)):
        batch = examples[start : start + BATCH_ROWS]
        by_example: dict[int, list[Encoded]] = {}
        for row in encoder.encode(renderer.render(batch, start)):
            by_example.setdefault(row.index, []).append(row)
        for index, found in by_example.items():
            lengths.extend(len(row) for row in found)
            example = examples[index]
            if overlong == "split" and max(len(row) for row in found) > max_length:
                example = part_renderer.only_trained(example)
            rows.extend(row for row in policy.apply(example, found) if row.num_trained)
    refuse(policy.counts, where)
    _fill(report, rows, lengths, encoder)
    report.overlong = overlong_facts(policy.counts, where)
    report.rendering = asdict(renderer.counts)
    report.encoding = asdict(encoder.counts)
    return rows


def _fill(report: SplitReport, rows: Sequence[Encoded], lengths: Sequence[int], encoder: Encoder) -> None:
    report.lengths = Lengths.of(lengths, "tokens")
    report.num_sequences = len(rows)
    report.num_tokens = sum(len(row) for row in rows)
    report.num_trained_tokens = sum(row.num_trained for row in rows)
    report.longest = max((len(row) for row in rows), default=0)
    if encoder.adds_bos:
        report.num_bos_missing = sum(int(row.ids[0]) != encoder.bos_id for row in rows)
    ends = encoder.turn_end_ids
    report.num_eos_untrained = sum(int(row.ids[row.trained.nonzero()[0][-1]]) not in ends for row in rows)


def turn_end_of(rows: Sequence[Encoded], examples: Sequence[Example], tokenizer: Any) -> str | None:
    """The token that the first trained answer of a conversation ends with, as text."""
    for row in rows:
        if isinstance(examples[row.index], Conversation):
            return tokenizer.convert_ids_to_tokens(int(row.ids[row.trained.nonzero()[0][-1]]))
    return None
