"""Rows over --max-length: what each policy keeps, and that every loss is counted in rows and in answer
tokens."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.data.prepare import prepare
from toolkit.errors import DataError


@pytest.fixture
def prepared(options, write_jsonl, tokenizer):
    def run(rows, max_length, overlong, eval_rows=None, **values):
        values.setdefault("skip_data_check", True)
        if eval_rows is not None:
            values["eval_data"] = write_jsonl(eval_rows, "eval.jsonl")
        config = options(data=write_jsonl(rows), max_length=max_length, overlong=overlong, **values)
        return prepare(config, tokenizer, "causal-lm", seed=0)

    return run


SHORT = ("a", "b")
LONG_PROMPT = ("word " * 60, "the answer")
LONG_ANSWER = ("a", "word " * 60)


def test_error_shows_the_longest_rows(prepared, make_chat):
    rows = [make_chat(*SHORT), *(make_chat("a", "word " * n) for n in (60, 1, 80, 70, 90, 61, 62))]
    with pytest.raises(
        DataError, match=r"6 rows are longer than --max-length 40; the longest:\n  .*jsonl:6: "
    ) as error:
        prepared(rows, 40, "error")
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[1:6]] == ["6", "4", "5", "8", "7"]
    assert "--overlong drop, truncate or split" in lines[6]


def test_drop_counts_rows_and_answer_tokens(prepared, make_chat):
    result = prepared([make_chat(*SHORT), make_chat(*LONG_PROMPT), make_chat(*LONG_ANSWER)], 40, "drop")
    facts = result.report.train.overlong
    assert len(result.train) == 1
    assert (facts["num_rows_over"], facts["num_rows_dropped"], facts["num_rows_cut"]) == (2, 2, 0)
    assert (
        facts["num_answer_tokens"] - facts["num_answer_tokens_lost"] == result.report.train.num_trained_tokens
    )


def test_truncation_that_takes_the_whole_answer_drops_the_row(prepared, make_chat):
    """TRL cuts silently and trains on nothing, or on the prompt."""
    result = prepared([make_chat(*SHORT), make_chat(*LONG_PROMPT), make_chat(*LONG_ANSWER)], 40, "truncate")
    facts = result.report.train.overlong
    assert len(result.train) == 2
    assert (facts["num_rows_over"], facts["num_rows_dropped"], facts["num_rows_cut"]) == (2, 1, 1)
    cut = result.train[1]
    assert len(cut["input_ids"]) == 40
    assert cut["labels"][-1] == cut["input_ids"][-1]
    assert (
        facts["num_answer_tokens"] - facts["num_answer_tokens_lost"] == result.report.train.num_trained_tokens
    )
    assert any("answer tokens" in warning for warning in result.report.warnings)


def test_all_rows_dropped_is_an_error_even_without_the_check(prepared, make_chat):
    with pytest.raises(
        DataError, match=r"none of the 2 train rows is left: 2 are longer than --max-length 40"
    ):
        prepared([make_chat(*LONG_PROMPT)] * 2, 40, "truncate")


def test_losing_too_many_rows_stops_unless_the_check_is_skipped(prepared, make_chat):
    rows = [make_chat(*SHORT), make_chat(*LONG_PROMPT)]
    with pytest.raises(DataError, match=r"--overlong drop touches 1 of 2 rows, 50.0 %"):
        prepared(rows, 40, "drop", skip_data_check=False)
    assert prepared(rows, 40, "drop", skip_data_check=False, max_lost_rows=0.5).report.problems == []
    assert len(prepared(rows, 40, "drop").report.problems) == 1


def test_split_cuts_between_turns_and_repeats_the_system_prompt(
    prepared, make_chat, tokenizer, trained_texts
):
    turns = [text for n in range(6) for text in (f"question {n}", f"answer {n}")]
    result = prepared([make_chat(*turns, system="Be kind.")], 64, "split")
    rows = list(result.train)
    assert len(rows) > 1
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    assert all(tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nBe kind.") for row in rows)
    trained = [text for row in rows for text in trained_texts(tokenizer, row)]
    assert trained == [f"answer {n}<|im_end|>" for n in range(6)]
    facts = result.report.train.overlong
    assert (facts["num_rows_split"], facts["num_pieces"], facts["num_answer_tokens_lost"]) == (
        1,
        len(rows),
        0,
    )


def test_split_keeps_the_choice_of_turns(prepared, make_chat, tokenizer, trained_texts):
    turns = [text for n in range(6) for text in (f"question {n}", f"answer {n}")]
    result = prepared([make_chat(*turns)], 64, "split", loss_on="last-assistant")
    assert [t for row in result.train for t in trained_texts(tokenizer, row)] == ["answer 5<|im_end|>"]


def test_split_leaves_out_and_counts_an_exchange_that_does_not_fit(
    prepared, make_chat, tokenizer, trained_texts
):
    result = prepared([make_chat("a", "b", *LONG_ANSWER, "c", "d")], 40, "split")
    assert [t for row in result.train for t in trained_texts(tokenizer, row)] == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]
    facts = result.report.train.overlong
    assert (
        facts["num_answer_tokens"] - facts["num_answer_tokens_lost"] == result.report.train.num_trained_tokens
    )


def test_split_text_into_pieces_each_with_bos(options, write_jsonl, make_tokenizer):
    tokenizer = make_tokenizer(None, eos="</s>", adds_bos=True)
    text = "Once upon a time there was a cat. " * 20
    config = options(data=write_jsonl([{"text": text}]), max_length=32, overlong="split")
    rows = list(prepare(config, tokenizer, "causal-lm", seed=0).train)
    assert all(row["input_ids"][0] == tokenizer.bos_token_id for row in rows)
    assert all(len(row["input_ids"]) <= 32 for row in rows)
    assert tokenizer.decode([t for row in rows for t in row["input_ids"][1:]]) == text + "</s>"
    assert all(label != -100 for row in rows for label in row["labels"][1:])


def test_held_out_rows_have_the_same_policy_and_a_report_of_their_own(prepared, make_chat):
    held_out = [make_chat("other", "x"), make_chat(*LONG_PROMPT), make_chat(*LONG_ANSWER)]
    result = prepared([make_chat(*SHORT)], 40, "drop", eval_rows=held_out)
    assert len(result.evaluation) == 1
    assert result.report.evaluation.overlong["num_rows_dropped"] == 2
    assert result.report.train.overlong["num_rows_dropped"] == 0
    assert any(
        problem.startswith("held-out: --overlong drop touches 2 of 3") for problem in result.report.problems
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    max_length=st.integers(12, 80),
    policy=st.sampled_from(["drop", "truncate", "split"]),
)
def test_nothing_is_lost_uncounted(tokenizer, make_chat, lengths, max_length, policy):
    from toolkit.data.check import Lengths, SplitReport
    from toolkit.data.formats import messages_format
    from toolkit.data.language import encode_examples

    example = messages_format(make_chat(*(text for a, b in lengths for text in ("q " * a, "w " * b))))
    report = SplitReport("train", "x", 1, Lengths.of([], "tokens"))
    options = {"loss_on": "assistant", "max_length": max_length, "overlong": policy, "where": str}
    rows = encode_examples([example], tokenizer, report, **options)
    facts = report.overlong
    assert all(len(row) <= max_length and row.num_trained for row in rows)
    assert facts["num_answer_tokens"] - facts["num_answer_tokens_lost"] == sum(
        row.num_trained for row in rows
    )
    assert facts["num_rows_dropped"] == int(not rows)
