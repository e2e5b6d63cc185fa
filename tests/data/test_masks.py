"""Which tokens are trained: the rendering of conversations, for the templates of the common families."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.data.collate import Collator
from toolkit.data.encode import Encoder
from toolkit.data.formats import messages_format
from toolkit.data.prepare import prepare
from toolkit.data.render import Renderer
from toolkit.errors import DataError, ModelError

TURNS = ("Hello there", "I am fine.", "What is the capital?", "Paris.")
EOS_OF = {"llama3": "</s>", "mistral": "</s>", "phi": "</s>"}
STABLE = ("chatml", "chatml-marks", "default-system", "llama3", "mistral", "qwen3", "phi", "no-end")


@pytest.fixture
def rows_of(options, write_jsonl, tmp_path):
    """Prepared training rows of the given source rows."""

    def rows(source, tokenizer, **values):
        data = write_jsonl(source)
        return prepare(options(data=data, skip_data_check=True, **values), tokenizer, "causal-lm", seed=0)

    return rows


def test_assistant_turns_with_their_end_are_trained_and_nothing_else(
    rows_of, tokenizer, make_chat, trained_texts
):
    row = rows_of([make_chat(*TURNS, system="Be kind.")], tokenizer).train[0]
    assert trained_texts(tokenizer, row) == ["I am fine.<|im_end|>", "Paris.<|im_end|>"]
    whole = tokenizer.apply_chat_template(make_chat(*TURNS, system="Be kind.")["messages"], tokenize=False)
    # What follows the last trained token (here a line break) is left off.
    assert tokenizer.decode(row["input_ids"]) == whole.rstrip()


def test_user_turns_are_not_trained_by_default(rows_of, tokenizer, make_chat, trained_texts):
    row = rows_of([make_chat("SECRET question", "answer")], tokenizer).train[0]
    assert "SECRET" in tokenizer.decode(row["input_ids"])
    assert "SECRET" not in "".join(trained_texts(tokenizer, row))


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", ["I am fine.<|im_end|>", "Paris.<|im_end|>"]),
        ("last-assistant", ["Paris.<|im_end|>"]),
        ("completion", ["Paris.<|im_end|>"]),
    ],
)
def test_loss_on(rows_of, tokenizer, make_chat, trained_texts, loss_on, expected):
    row = rows_of([make_chat(*TURNS)], tokenizer, loss_on=loss_on).train[0]
    assert trained_texts(tokenizer, row) == expected


def test_loss_on_all_trains_everything_but_the_first_token(rows_of, tokenizer, make_chat):
    row = rows_of([make_chat(*TURNS)], tokenizer, loss_on="all").train[0]
    assert row["labels"][0] == -100
    assert row["labels"][1:] == row["input_ids"][1:]
    messages = make_chat(*TURNS)["messages"]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("name", STABLE)
def test_every_trained_turn_continues_what_inference_asks(rows_of, make_tokenizer, make_chat, name):
    """For each answer there is one row in which it follows the very tokens of the generation prompt."""
    tokenizer = make_tokenizer(name, eos=EOS_OF.get(name, "<|im_end|>"))
    source = make_chat(*TURNS)
    rows = list(rows_of([source], tokenizer).train)
    for turn in (1, 3):
        messages = source["messages"]
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        hosts = [
            row
            for row in rows
            if row["input_ids"][: len(prompt)] == prompt and len(row["labels"]) > len(prompt)
        ]
        begun = [row for row in hosts if row["labels"][len(prompt)] != -100]
        assert len(begun) == 1
        row = begun[0]
        assert row["labels"][len(prompt) - 1] == -100
        end = next(
            (n for n in range(len(prompt), len(row["labels"])) if row["labels"][n] == -100),
            len(row["labels"]),
        )
        text = tokenizer.decode(row["input_ids"][len(prompt) : end])
        answer = answered[len(tokenizer.decode(prompt)) :].rstrip()
        assert text.startswith(answer) or answer.startswith(text)
        assert messages[turn]["content"] in text
        assert row["input_ids"][end - 1] in tokenizer.all_special_ids


def test_generation_marks_change_nothing(rows_of, make_tokenizer, make_chat):
    with_marks = rows_of([make_chat(*TURNS)], make_tokenizer("chatml-marks")).train[0]
    without = rows_of([make_chat(*TURNS)], make_tokenizer("chatml")).train[0]
    assert with_marks == without


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_its_own_row(
    rows_of, make_tokenizer, make_chat, trained_texts
):
    tokenizer = make_tokenizer("qwen3")
    source = make_chat("Hello", "<think>\nhm\n</think>\n\nHi.", "And?", "<think>\noh\n</think>\n\nBye.")
    prepared = rows_of([source], tokenizer)
    texts = [trained_texts(tokenizer, row) for row in prepared.train]
    assert texts == [
        ["<think>\nhm\n</think>\n\nHi.<|im_end|>"],
        ["<think>\noh\n</think>\n\nBye.<|im_end|>"],
    ]
    assert "hm" not in tokenizer.decode(prepared.train[1]["input_ids"])
    assert prepared.report.train.rendering["num_turns_with_own_row"] == 1


def test_a_template_whose_prompt_is_no_prefix_is_an_error_that_says_so(rows_of, make_tokenizer, make_chat):
    with pytest.raises(DataError, match=r"data.jsonl:1: the chat template asks for turn 2 with .*<think>"):
        rows_of([make_chat("Hello", "Hi.")], make_tokenizer("unstable"))


def test_a_template_that_refuses_a_role_names_the_row(rows_of, make_tokenizer, make_chat):
    source = [make_chat("a", "b"), make_chat("a", "b", system="no")]
    with pytest.raises(
        DataError, match=r"jsonl:2: the chat template cannot render.*Only user and assistant roles"
    ):
        rows_of(source, make_tokenizer("mistral", eos="</s>"))


def test_no_chat_template_is_an_error_that_names_the_option(rows_of, make_tokenizer, make_chat):
    with pytest.raises(ModelError, match="no chat template") as error:
        rows_of([make_chat("a", "b")], make_tokenizer(None))
    assert "--chat-template" in str(error.value)


def test_bos_once_where_template_and_tokenizer_both_write_it(rows_of, make_tokenizer, make_chat):
    tokenizer = make_tokenizer("llama3", eos="</s>", adds_bos=True)
    row = rows_of([make_chat(*TURNS)], tokenizer).train[0]
    assert (
        tokenizer(tokenizer.decode(row["input_ids"])).input_ids[:2] == [tokenizer.bos_token_id] * 2
    )  # the trap
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id


def test_a_conversation_gets_no_bos_that_its_template_does_not_write(rows_of, make_tokenizer, make_chat):
    """apply_chat_template adds none at inference either; the report says that plain text has one."""
    tokenizer = make_tokenizer("chatml", adds_bos=True)
    prepared = rows_of([make_chat(*TURNS)], tokenizer)
    whole = tokenizer.apply_chat_template(make_chat(*TURNS)["messages"], return_dict=False)
    assert prepared.train[0]["input_ids"] == whole[: prepared.longest]
    assert tokenizer.bos_token_id not in prepared.train[0]["input_ids"]
    assert prepared.report.train.num_bos_missing == 1


def test_a_template_that_writes_bos_twice_is_repaired_and_counted(rows_of, make_tokenizer, make_chat):
    tokenizer = make_tokenizer("llama3", eos="</s>")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    prepared = rows_of([make_chat(*TURNS)], tokenizer)
    assert prepared.train[0]["input_ids"].count(tokenizer.bos_token_id) == 1
    assert prepared.report.train.encoding["num_double_bos"] == 1


@pytest.mark.parametrize("adds_bos", [True, False])
def test_text_is_trained_whole_with_one_bos_and_one_eos(rows_of, make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(None, eos="</s>", adds_bos=adds_bos)
    rows = rows_of([{"text": "The sky is blue."}, {"text": "<s>Paris</s>"}], tokenizer).train
    for row in rows:
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert row["labels"][1:] == row["input_ids"][1:]
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == int(adds_bos)
    assert rows[1]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_prompt_and_completion_without_template_are_joined_and_end_with_eos(
    rows_of, make_tokenizer, trained_texts
):
    tokenizer = make_tokenizer(None, eos="</s>")
    row = rows_of([{"prompt": "The sky is", "completion": " blue."}], tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "The sky is blue.</s>"
    assert trained_texts(tokenizer, row) == [" blue.</s>"]


def test_prompt_and_completion_with_template_are_a_user_and_an_assistant_turn(
    rows_of, tokenizer, trained_texts
):
    row = rows_of([{"prompt": "Hello", "completion": "Hi."}], tokenizer).train[0]
    assert (
        tokenizer.decode(row["input_ids"])
        == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>"
    )
    assert trained_texts(tokenizer, row) == ["Hi.<|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last-assistant"])
def test_assistant_turns_of_a_prompt_are_not_trained(rows_of, tokenizer, make_chat, trained_texts, loss_on):
    messages = make_chat(*TURNS)["messages"]
    row = rows_of([{"prompt": messages[:3], "completion": messages[3:]}], tokenizer, loss_on=loss_on).train[0]
    assert trained_texts(tokenizer, row) == ["Paris.<|im_end|>"]


def test_weight_zero_takes_a_turn_out(rows_of, tokenizer, make_chat, trained_texts):
    source = make_chat(*TURNS)
    source["messages"][1]["weight"] = 0
    assert trained_texts(tokenizer, rows_of([source], tokenizer).train[0]) == ["Paris.<|im_end|>"]


def test_a_token_over_the_border_is_split_so_that_the_prompt_is_that_of_inference(
    rows_of, make_tokenizer, trained_texts
):
    """'The' + ' capital': the joined text has the token ' capital', the prompt alone ends with a space of its
    own."""
    tokenizer = make_tokenizer(None, eos="</s>")
    prompt, completion = "What is the ", "capital of France"
    prepared = rows_of([{"prompt": prompt, "completion": completion}], tokenizer)
    ids = prepared.train[0]["input_ids"]
    expected = tokenizer(prompt).input_ids
    assert tokenizer(prompt + completion).input_ids[: len(expected)] != expected  # the trap
    assert ids[: len(expected)] == expected
    assert trained_texts(tokenizer, prepared.train[0]) == [completion + "</s>"]
    assert prepared.report.train.encoding["num_straddling"] == 1


def test_empty_answers_are_not_trained_and_counted(rows_of, tokenizer, make_chat, trained_texts):
    prepared = rows_of([make_chat("a", " ", "b", "c"), make_chat("d", ""), make_chat("e", "f")], tokenizer)
    assert [trained_texts(tokenizer, row) for row in prepared.train] == [["c<|im_end|>"], ["f<|im_end|>"]]
    assert prepared.report.train.rendering["num_empty_answers"] == 2
    assert prepared.report.train.rendering["num_rows_without_answer"] == 1


def test_all_rows_gone_is_an_error_that_says_why(rows_of, tokenizer, make_chat):
    with pytest.raises(DataError, match=r"none of the 2 train rows is left: 2 have no answer to train"):
        rows_of([make_chat("a", ""), make_chat("b")], tokenizer)


def test_completion_only_is_not_ignored_on_chat_and_text_is_whole(rows_of, tokenizer, make_chat):
    """TRL trains every token of a `text` row whatever was asked; here only text is whole, and the report says
    so."""
    text = rows_of([{"text": "The sky is blue."}], tokenizer, loss_on="completion")
    assert text.report.data_format == "text"
    assert text.report.train.num_trained_tokens == text.report.train.num_tokens - 1


def test_tool_calls_and_their_answers_go_to_the_template(rows_of, tokenizer, trained_texts):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "no", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is dry."},
    ]
    row = rows_of([{"messages": messages}], tokenizer).train[0]
    first, second = trained_texts(tokenizer, row)
    assert first.startswith("<tool_call>{")
    assert '"arguments": {"city": "Paris"}' in first
    assert first.endswith("<|im_end|>")
    assert second == "It is dry.<|im_end|>"
    assert "no<|im_end|>" not in first + second


def test_text_of_special_tokens_in_a_message_is_noticed(rows_of, tokenizer, make_chat):
    report = rows_of([make_chat("Hello <|im_end|> there", "Hi.")], tokenizer).report
    assert report.train.rendering["num_rows_with_special_text"] == 1
    assert any("special token" in warning for warning in report.warnings)


def test_pad_equal_to_eos_keeps_eos_trained(rows_of, make_tokenizer, make_chat):
    tokenizer = make_tokenizer("chatml", pad="<|im_end|>")
    rows = rows_of([make_chat("a", "b"), make_chat(*TURNS)], tokenizer).train
    batch = Collator(tokenizer.pad_token_id)([rows[0], rows[1]])
    short = len(rows[0]["input_ids"])
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0].sum() == short
    assert (batch["labels"][0, short:] == -100).all()


def test_tokenising_by_pieces_gives_the_masks_of_offsets(rows_of, tokenizer, make_chat):
    """The way of tokenizers without offsets."""
    fast = rows_of([make_chat(*TURNS)], tokenizer).train[0]
    rendered = Renderer(tokenizer, "assistant", str).render([messages_format(make_chat(*TURNS))])
    encoder = Encoder(tokenizer)
    encoder.is_fast = False
    slow = encoder.encode(rendered)[0]
    assert slow.ids.tolist() == fast["input_ids"]
    assert slow.trained.tolist() == [label != -100 for label in fast["labels"]]


WORDS = st.text(alphabet="aeio HF.?é\n漢", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(WORDS, min_size=2, max_size=6),
    name=st.sampled_from([n for n in STABLE if n != "no-end"]),
    loss_on=st.sampled_from(["assistant", "last-assistant", "completion", "all"]),
)
def test_mask_invariants(make_tokenizer, make_chat, turns, name, loss_on):
    """Labels are the ids or -100; the answers, and for the other choices no user text, are trained; rows end
    trained."""
    tokenizer = _cached(make_tokenizer, name)
    source = make_chat(*turns)
    rows = Encoder(tokenizer).encode(Renderer(tokenizer, loss_on, str).render([messages_format(source)]))
    trained = "".join(tokenizer.decode(row.ids[row.trained].tolist()) for row in rows)
    answers = [m["content"].strip() for m in source["messages"] if m["role"] == "assistant"]
    for answer in answers if loss_on in ("assistant", "all") else answers[-1:]:
        if loss_on == "completion" and len(turns) % 2:
            continue
        assert answer in trained
    for row in rows:
        assert not row.trained[0]
        assert len(row.ids) == len(row.trained)
        assert row.trained[-1]
        if loss_on != "all":
            assert "user" not in tokenizer.decode(row.ids[row.trained].tolist())
    if not rows:
        assert loss_on == "completion"


_TOKENIZERS = {}


def _cached(make_tokenizer, name):
    if name not in _TOKENIZERS:
        _TOKENIZERS[name] = make_tokenizer(name, eos=EOS_OF.get(name, "<|im_end|>"))
    return _TOKENIZERS[name]
