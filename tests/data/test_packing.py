"""Packed sequences: complete, tight, deterministic, and their rows do not see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.collate import Collator
from toolkit.data.packing import pack
from toolkit.data.prepare import prepare


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 80))
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(n for rows in bins for n in rows) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in rows) <= capacity for rows in bins)
    assert bins == pack(lengths, capacity)
    # Best fit leaves at most one sequence that is not more than half full.
    assert sum(2 * sum(lengths[n] for n in rows) <= capacity for rows in bins) <= 1


def test_best_fit_takes_the_tightest_sequence():
    assert pack([6, 5, 4, 3], 9) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="row 1 has 10 tokens"):
        pack([3, 10], 9)


@pytest.fixture
def rows(options, write_jsonl, make_chat, tokenizer):
    """The same rows alone and packed, from few to many tokens."""
    texts = [make_chat("word " * (n % 5 + 1), "Hello there " * (n % 7 + 1)) for n in range(9)]
    data = write_jsonl(texts)
    alone = prepare(options(data=data), tokenizer, "causal-lm", seed=0).train
    packed = prepare(options(data=data, packing=True, max_length=100), tokenizer, "causal-lm", seed=0).train
    return list(alone), list(packed)


def test_packed_columns(rows):
    alone, packed = rows
    assert len(packed) < len(alone)
    assert sum(row["length"] for row in packed) == sum(row["length"] for row in alone)
    for row in packed:
        assert sum(row["seq_lengths"]) == row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert row["position_ids"] == [n for length in row["seq_lengths"] for n in range(length)]
        # The first token of a row must not be predicted from the row before it.
        assert all(
            label == -100 for label, n in zip(row["labels"], row["position_ids"], strict=True) if n == 0
        )


def parts_of(batch, logits, rows):
    """Logits of every packed row by its tokens."""
    found = {}
    for number, row in enumerate(rows):
        start = 0
        for length in row["seq_lengths"]:
            found[tuple(row["input_ids"][start : start + length])] = logits[number, start : start + length]
            start += length
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_to_multiple_of", [1, 64])
def test_packed_rows_give_the_logits_of_rows_alone(
    rows, tiny_llama, tokenizer, attention, pad_to_multiple_of
):
    """All packed rows in one batch, so that short ones are padded. Bound: 1e-5 absolute, the rounding of
    fp32."""
    alone, packed = rows
    tiny_llama.set_attn_implementation(attention)
    assert len({row["length"] for row in packed}) > 1
    batch = Collator(tokenizer.pad_token_id, packing=True, pad_to_multiple_of=pad_to_multiple_of)(packed)
    assert "attention_mask" not in batch
    with torch.no_grad():
        logits = tiny_llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        found = parts_of(batch, logits, packed)
        for row in alone:
            expected = tiny_llama(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            assert (found[tuple(row["input_ids"])] - expected).abs().max() < 1e-5


def test_without_own_positions_rows_would_see_each_other(rows, tiny_llama):
    """The test above can fail: positions that run on change the logits."""
    _, packed = rows
    row = next(row for row in packed if len(row["seq_lengths"]) > 1)
    with torch.no_grad():
        logits = tiny_llama(torch.tensor([row["input_ids"]]), use_cache=False).logits
    found = parts_of(None, logits, [row])
    last = list(found)[-1]
    expected = tiny_llama(torch.tensor([list(last)]), use_cache=False).logits[0]
    assert (found[last] - expected).abs().max() > 1e-3


def test_the_loss_of_a_packed_batch_is_that_of_its_rows(rows, tiny_llama, tokenizer):
    alone, packed = rows
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        a = tiny_llama(**Collator(pad, packing=True)(packed), use_cache=False).loss
        b = tiny_llama(**Collator(pad)(alone), use_cache=False).loss
    assert abs(a - b) < 1e-5


def test_padding_is_never_part_of_a_row(rows, tiny_llama, tokenizer):
    """Other pad tokens change no logit of a row."""
    _, packed = rows
    with torch.no_grad():
        results = []
        for pad in (tokenizer.pad_token_id, 7):
            batch = Collator(pad, packing=True, pad_to_multiple_of=64)(packed)
            logits = tiny_llama(
                batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
            results.append(parts_of(batch, logits, packed))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


def test_flat_batches_for_flash_attention(rows, tiny_llama, tokenizer):
    _, packed = rows
    flat = Collator(tokenizer.pad_token_id, packing=True, flatten=True)(packed)
    assert flat["input_ids"].shape == (1, sum(row["length"] for row in packed))
    usual = Collator(tokenizer.pad_token_id, packing=True)(packed)
    with torch.no_grad():
        assert (
            abs(tiny_llama(**flat, use_cache=False).loss - tiny_llama(**usual, use_cache=False).loss) < 1e-5
        )


def test_lengths_say_where_rows_begin_when_positions_are_gone(rows, tokenizer):
    """TRL keeps seq_lengths and takes other columns away."""
    _, packed = rows
    collator = Collator(tokenizer.pad_token_id, packing=True)
    short = [{k: row[k] for k in ("input_ids", "labels", "seq_lengths")} for row in packed]
    assert torch.equal(collator(short)["position_ids"], collator(packed)["position_ids"])
    with pytest.raises(ValueError, match="neither position_ids nor seq_lengths"):
        collator([{k: row[k] for k in ("input_ids", "labels")} for row in packed])


def test_padded_batches():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = Collator(0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100] * 4]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    labelled = Collator(0, "sequence-classification")(
        [{"input_ids": [5], "labels": 2}, {"input_ids": [6, 7], "labels": 0}]
    )
    assert labelled["labels"].tolist() == [2, 0]


def test_wrong_collators():
    with pytest.raises(ValueError, match="packing is for causal-lm"):
        Collator(0, "sequence-classification", packing=True)
    with pytest.raises(ValueError, match="unknown task"):
        Collator(0, "chess")
