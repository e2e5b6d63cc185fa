"""The conversations: clean, alternating, verifiable JSON, no question in two partitions."""

import json
import re
from pathlib import Path

import pytest
import yaml

from toolkit.data.samples import chatterbot, conversations, make
from toolkit.data.samples.intents import SPLITS
from toolkit.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def partitions(tmp_path_factory) -> dict[str, list[dict]]:
    folder = make("conversations", tmp_path_factory.mktemp("conversations") / "data", languages=["en", "sq"])
    return {name: read(folder / f"{name}.jsonl") for name in SPLITS}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


def test_roles_alternate_and_nothing_is_empty(partitions):
    for rows in partitions.values():
        for row in rows:
            assert list(row) == ["messages", "source", "language", "topic"]
            roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert len(roles) >= 2
            assert all(message["content"].strip() for message in row["messages"])


def test_there_are_a_few_thousand_rows_of_both_sources(partitions):
    english = [row for rows in partitions.values() for row in rows if row["language"] == "en"]
    assert 2000 < len(english) < 5000
    assert {row["source"] for row in english} == {"chatterbot-corpus", "home-assistant-intents"}
    assert {row["source"] for rows in partitions.values() for row in rows if row["language"] == "sq"} == {
        "meldkit"
    }


def test_lengths_are_ragged(partitions):
    turns = {len(row["messages"]) for row in partitions["train"]}
    assert {2, 3, 4, 6} <= turns


def test_requests_are_answered_with_one_line_of_json(partitions):
    for rows in partitions.values():
        for row in rows:
            if row["source"] == "chatterbot-corpus":
                continue
            system, _, reply = (message["content"] for message in row["messages"])
            assert system == conversations.SYSTEM_PROMPT
            assert "\n" not in reply
            value = json.loads(reply)
            assert next(iter(value)) == "intent"
            assert value["intent"].startswith("Hass")


def test_names_in_an_english_answer_are_words_of_the_request(partitions):
    named = 0
    for row in partitions["train"]:
        if row["source"] == "home-assistant-intents":
            _, request, reply = (message["content"] for message in row["messages"])
            for slot in ("name", "area", "floor"):
                value = json.loads(reply).get(slot)
                if value is not None:
                    named += 1
                    assert value in request
    assert named > 500


def test_no_question_is_in_two_partitions(partitions):
    # By source: "hi" is small talk in one, and a request under another system prompt in the other.
    seen: dict[tuple[str, str], str] = {}
    for name, rows in partitions.items():
        for row in rows:
            for message in row["messages"]:
                if message["role"] == "user":
                    assert seen.setdefault((row["source"], key(message["content"])), name) == name


def test_no_long_answer_of_the_corpus_is_in_two_partitions():
    seen: dict[str, str] = {}
    for dialogue in chatterbot.conversations("en", seed=0):
        for answer in dialogue.turns[1::2]:
            if len(answer) > chatterbot.SHORT_ANSWER_LENGTH:
                assert seen.setdefault(key(answer), dialogue.partition) == dialogue.partition


@pytest.mark.parametrize("language", sorted(chatterbot.FOLDERS))
def test_the_corpus_is_read_in_every_language(language):
    found = chatterbot.conversations(language, seed=1)
    assert found
    assert all(len(dialogue.turns) % 2 == 0 for dialogue in found)


def test_the_chat_demo_asks_under_the_system_prompt_of_the_data():
    demo = yaml.safe_load((ROOT / "recipes" / "configs" / "demo_chat.yaml").read_text(encoding="utf-8"))
    assert demo["sample_system_prompt"] == conversations.SYSTEM_PROMPT


def test_one_source_only(tmp_path):
    folder = make("conversations", tmp_path / "a", source="intents", rows_per_intent=5)
    assert {row["source"] for row in read(folder / "train.jsonl")} == {"home-assistant-intents"}
    folder = make("conversations", tmp_path / "b", source="chatterbot", languages=["de"])
    assert {row["source"] for row in read(folder / "train.jsonl")} == {"chatterbot-corpus"}
    card = (folder / "README.md").read_text()
    assert "chatterbot-corpus 1.3.3" in card
    assert "smart home" not in card
    with pytest.raises(InputError, match="no rows in sq"):
        make("conversations", tmp_path / "c", source="chatterbot", languages=["sq"])
    assert not (tmp_path / "c").exists()
