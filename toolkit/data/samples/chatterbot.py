"""Question and answer pairs of chatterbot-corpus, cleaned and divided without leaks."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

from toolkit import wheels
from toolkit.data.samples.intents import HELD_OUT_SHARE, SPLITS
from toolkit.wheels import Announce, Wheel, silent

CHATTERBOT_CORPUS = Wheel(
    package="chatterbot-corpus",
    version="1.3.3",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    num_bytes=345_706,
    licence="BSD",
    members=("chatterbot_corpus/data/*/*.yml",),
)

FOLDERS = {
    "bn": "bengali",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fa": "persian",
    "fr": "french",
    "he": "hebrew",
    "hi": "hindi",
    "id": "indonesian",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "mr": "marathi",
    "nl": "dutch",
    "or": "oriya",
    "pt": "portuguese",
    "ru": "russian",
    "sv": "swedish",
    "ta": "tamil",
    "te": "telugu",
    "th": "thai",
    "tr": "turkish",
    "uk": "ukrainian",
    "ur": "urdu",
    "yo": "yoruba",
    "zh": "chinese",
    "zh-TW": "traditionalchinese",
}
"""Language code to the corpus's folder."""

DIALOGUES = frozenset({"conversations", "conversation", "health", "sports", "psychology"})
"""Files whose longer entries are dialogues; in the others, what follows a question are its other answers."""
MAX_ANSWERS = 3
MAX_ENTRY_LENGTH = 32
EXCHANGES = (1, 1, 1, 1, 2, 2, 3)
"""Exchanges in one conversation, drawn from this: most have one, some two or three on the same topic."""
SHORT_ANSWER_LENGTH = 24
"""Answers up to this length ("No.", "I don't know.") may appear in several partitions."""


@dataclass(frozen=True)
class Dialogue:
    """Turns that begin with the user's and alternate; the last one is the assistant's."""

    turns: tuple[str, ...]
    topic: str
    partition: str = ""


def conversations(language: str, *, seed: int, announce: Announce = silent) -> list[Dialogue]:
    """Return the corpus of one language as conversations of one to three exchanges on one topic, divided
    and shuffled.

    A question appears in one partition only, with all its answers; the same goes for an answer that is
    longer than a few words.

    Args:
        language: a key of :data:`FOLDERS`.
        seed: of the division and the order.
    """
    root = wheels.unpacked(CHATTERBOT_CORPUS, announce=announce)
    folder = Path(root, "chatterbot_corpus", "data", FOLDERS[language])
    random = Random(f"{seed} chatterbot {language}")
    dialogues = []
    for path in sorted(folder.glob("*.yml")):
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        topic = (content.get("categories") or [path.stem])[0].strip().lower()
        dialogues += _dialogues(content.get("conversations") or [], topic, is_dialogue=path.stem in DIALOGUES)
    return _chained(_divided(_unique(dialogues), random), random)


def _dialogues(entries: Iterable[object], topic: str, *, is_dialogue: bool) -> list[Dialogue]:
    found = []
    for entry in entries:
        if not isinstance(entry, list) or not 2 <= len(entry) <= MAX_ENTRY_LENGTH:
            continue
        turns = [_clean(turn) for turn in entry if isinstance(turn, str)]
        if len(turns) < len(entry) or not all(turns):
            continue
        if is_dialogue:
            found.append(Dialogue(tuple(turns[: len(turns) // 2 * 2]), topic))
        else:
            found += [Dialogue((turns[0], answer), topic) for answer in turns[1 : 1 + MAX_ANSWERS]]
    return found


def _clean(turn: str) -> str:
    """Return the turn with single spaces; the line breaks of code are kept."""
    if "```" in turn:
        return turn.strip()
    return re.sub(r"\s+", " ", turn).strip()


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


def _unique(dialogues: list[Dialogue]) -> list[Dialogue]:
    """Leave out repeated pairs, answers that repeat the question, and answers after the third."""
    seen: set[tuple[str, ...]] = set()
    num_answers: dict[str, int] = {}
    kept = []
    for dialogue in dialogues:
        keys = tuple(_key(turn) for turn in dialogue.turns)
        if not all(keys) or keys[0] == keys[1] or keys in seen:
            continue
        seen.add(keys)
        num_answers[keys[0]] = num_answers.get(keys[0], 0) + 1
        if num_answers[keys[0]] <= MAX_ANSWERS:
            kept.append(dialogue)
    return kept


def _divided(dialogues: list[Dialogue], random: Random) -> list[Dialogue]:
    """Give every dialogue a partition; those that share a question or a long answer get the same one."""
    parent = list(range(len(dialogues)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, dialogue in enumerate(dialogues):
        for position, turn in enumerate(dialogue.turns):
            is_answer = position % 2 == 1
            if is_answer and len(turn) <= SHORT_ANSWER_LENGTH:
                continue
            parent[root(index)] = root(first_with.setdefault(_key(turn), index))
    groups: dict[int, list[int]] = {}
    for index in range(len(dialogues)):
        groups.setdefault(root(index), []).append(index)
    shuffled = list(groups.values())
    random.shuffle(shuffled)
    held_out = round(len(dialogues) * HELD_OUT_SHARE)
    num_rows = dict.fromkeys(SPLITS, 0)
    partitions = [""] * len(dialogues)
    for group in shuffled:
        # A group larger than a tenth of a held-out partition would be most of it: such groups are trained.
        fits = [name for name in ("test", "validation") if num_rows[name] + len(group) <= held_out]
        name = fits[0] if fits and len(group) * 10 <= max(10, held_out) else "train"
        num_rows[name] += len(group)
        for index in group:
            partitions[index] = name
    return [Dialogue(d.turns, d.topic, partitions[index]) for index, d in enumerate(dialogues)]


def _chained(dialogues: list[Dialogue], random: Random) -> list[Dialogue]:
    """Join single exchanges of one topic and partition to conversations of one to three, and shuffle all."""
    done = [dialogue for dialogue in dialogues if len(dialogue.turns) > 2]
    singles: dict[tuple[str, str], list[Dialogue]] = {}
    for dialogue in dialogues:
        if len(dialogue.turns) == 2:
            singles.setdefault((dialogue.partition, dialogue.topic), []).append(dialogue)
    for (partition, topic), members in singles.items():
        waiting = random.sample(members, len(members))
        while waiting:
            turns: list[str] = []
            asked: set[str] = set()
            for _ in range(random.choice(EXCHANGES)):
                if waiting and _key(waiting[-1].turns[0]) not in asked:
                    exchange = waiting.pop()
                    asked.add(_key(exchange.turns[0]))
                    turns += exchange.turns
            done.append(Dialogue(tuple(turns), topic, partition))
    random.shuffle(done)
    return done
