"""Formats: recognition, rows that do not keep to them, and what is said when nothing fits."""

from types import SimpleNamespace

import pytest

from toolkit.data.examples import Conversation, Labelled, PlainText
from toolkit.data.files import make_table
from toolkit.data.formats import FORMATS
from toolkit.data.recognise import build_examples, guess_task, recognise
from toolkit.errors import DataError


def examples_of(*rows, task="causal-lm", data_format="auto", mapping=None):
    table = make_table("data.jsonl", list(rows), range(1, len(rows) + 1), "line")
    layout = recognise(table, data_format=data_format, data_mapping=mapping or {}, task=task)
    return layout.format.name, build_examples(table, layout)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised_by_its_sample(name):
    entry = FORMATS[name]
    task = "sequence-classification" if entry.gives == "labelled" else "causal-lm"
    found, examples = examples_of(dict(entry.sample), task=task)
    assert found == name
    kind = {"conversation": Conversation, "text": PlainText, "labelled": Labelled}[entry.gives]
    assert isinstance(examples[0], kind)
    assert entry.summary


def turns(example):
    return [(m.role, m.content) for m in example.messages]


def test_what_each_format_makes_of_a_row():
    share = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    assert turns(examples_of(share)[1][0]) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert turns(examples_of(alpaca)[1][0]) == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert turns(examples_of({**alpaca, "input": ""})[1][0])[0] == ("user", "Add.")
    guide = {"system_prompt": "s", "user_prompt": "u", "feedback": "f"}
    assert turns(examples_of(guide)[1][0]) == [("system", "s"), ("user", "u"), ("assistant", "f")]
    massive = {"utt": "wake me", "intent": "alarm_set", "locale": "en-US"}
    assert examples_of(massive, task="sequence-classification")[1][0] == Labelled(
        "wake me", "alarm_set", "en-US"
    )
    assert examples_of({"text": "x", "label": 3}, task="sequence-classification")[1][0].label == "3"


def test_a_text_with_a_label_is_text_for_a_language_model():
    assert examples_of({"text": "x", "label": "y"})[0] == "text"


def test_mapped_columns():
    name, examples = examples_of({"q": "1+1", "a": "2", "id": 7}, mapping={"prompt": "q", "completion": "a"})
    assert name == "prompt-completion"
    assert turns(examples[0]) == [("user", "1+1"), ("assistant", "2")]


WRONG_ROWS = [
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "message 1 has the role 'robot'; known roles: system",
    ),
    ({"messages": [{"role": "user", "content": None}]}, r"the content of message 1 \(user\) is null"),
    ({"messages": [{"role": "user", "content": 3}]}, r"the content of message 1 \(user\) is a number"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        r"message 1 \(user\) is a list; a text is needed",
    ),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": ["hello"]}, "message 1 is str; an object with role and content is needed"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]},
        "a call without a function name",
    ),
    (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]},
        "only the assistant calls tools",
    ),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 is from 'alien'; known: human"),
    ({"conversations": [{"from": "gpt"}]}, "the value of turn 1 is null"),
    (
        {"prompt": "x", "completion": [{"role": "user", "content": "y"}]},
        "prompt and completion are of two kinds",
    ),
    ({"instruction": "x", "output": None}, "output is null; a text is needed"),
    ({"text": None}, "text is null; a text is needed"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS)
def test_a_wrong_row_is_named(row, message):
    good = dict(FORMATS["text"].sample) if "text" in row else row
    with pytest.raises(DataError, match=message) as error:
        examples_of(row) if good is row else examples_of(good, row)
    assert "data.jsonl:" in str(error.value)


@pytest.mark.parametrize("speaker", [["human"], {"a": 1}, 3, None])
def test_a_turn_from_something_that_is_no_text(speaker):
    row = {"conversations": [{"from": speaker, "value": "a"}, {"from": "gpt", "value": "b"}]}
    with pytest.raises(DataError, match=r"data.jsonl:1: turn 1 is from "):
        examples_of(row)


def test_a_column_of_two_kinds_is_wrong_where_it_is_read_only():
    with pytest.raises(
        DataError, match=r"data.jsonl:3: column 'text' holds a number here and a text in data.jsonl:1"
    ):
        examples_of({"text": "a"}, {"text": None}, {"text": 3})
    rows = ({"text": "a", "meta": 1}, {"text": "b", "meta": {"n": 1}}, {"text": "c", "meta": "x"})
    assert len(examples_of(*rows)[1]) == 3


def test_several_wrong_rows_are_counted():
    rows = [{"text": "fine"}, *({"text": None} for _ in range(5))]
    with pytest.raises(
        DataError,
        match=r"5 rows do not keep to the format text:\n  data.jsonl:2: .*\n.*\n.*\n  ... and 2 more",
    ):
        examples_of(*rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": "x", "label": None}, "label is null"), ({"text": "x", "label": " "}, "label is empty")],
)
def test_wrong_labels(row, message):
    with pytest.raises(DataError, match=message):
        examples_of({"text": "x", "label": "a"}, row, task="sequence-classification")


def test_nothing_fits():
    row = {
        "question": "What is the capital of France, and how many people live there?",
        "answer": "Paris",
        "completion": "x",
    }
    with pytest.raises(DataError) as error:
        examples_of(row)
    text = str(error.value)
    assert "the columns fit no format" in text
    assert "columns: question, answer, completion" in text
    assert "What is the capital of France, and ho..." in text
    assert "nearest: prompt-completion, which needs prompt, completion; missing: prompt" in text
    assert "--data-mapping prompt=question" in text


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(DataError, match=r"unknown data format 'mesages'; did you mean 'messages'\?"):
        examples_of({"text": "x"}, data_format="mesages")
    with pytest.raises(
        DataError, match=r"prompt=qestion names a column that is not there; did you mean 'question'\?"
    ):
        examples_of({"question": "x", "answer": "y"}, mapping={"prompt": "qestion"})
    with pytest.raises(DataError, match="a field that no format has: promt"):
        examples_of({"question": "x", "answer": "y"}, mapping={"promt": "question"})


def test_labels_need_the_task_for_them():
    with pytest.raises(DataError, match="the format massive has labels and the task is causal-lm"):
        examples_of({"utt": "x", "intent": "y"})


def test_the_task_is_guessed_from_the_columns():
    def guess(row, **values):
        config = SimpleNamespace(**{"data_format": "auto", "data_mapping": {}, **values})
        return guess_task(make_table("x", [row], [1], "row"), config)

    assert (
        guess({"utt": "x", "intent": "y"}) == guess({"text": "x", "label": "y"}) == "sequence-classification"
    )
    assert guess({"text": "x"}) == guess({"messages": [], "label": "y"}) == "causal-lm"
    assert guess({"text": "x", "label": "y"}, data_format="text") == "causal-lm"
