"""Intents of a voice assistant in many languages, in the shape of MASSIVE, split by template."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from toolkit.data.samples.templates import Language, Template
from toolkit.errors import DataError

SPLITS: tuple[str, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1
"""Share of the templates, and of the rows, in validation; the same again in test."""
MAX_MISSES = 60
"""A split of an intent ends when so many walks in a row found nothing new."""
MAX_SPLITS_TRIED = 20

SCENARIOS = (
    ("HassGetWeather", "weather"),
    ("HassGetCurrent", "datetime"),
    ("HassMedia", "play"),
    ("HassSetVolume", "audio"),
    ("HassShoppingList", "lists"),
    ("HassList", "lists"),
    ("HassNevermind", "general"),
    ("HassRespond", "general"),
    ("HassBroadcast", "general"),
)
"""MASSIVE's scenario by the beginning of the intent's name; timers are its alarm, and the rest its iot."""


@dataclass(frozen=True)
class Row:
    """One utterance with its label.

    Args:
        text: the utterance.
        intent: its label, e.g. ``HassTurnOn``.
        slots: names to values that the utterance carries.
        partition: train, validation or test.
        template: the template that it came from; each one lies in one partition only.
    """

    text: str
    intent: str
    slots: dict[str, Any]
    partition: str
    template: str


def scenario(intent: str) -> str:
    """Return the domain of an intent, in MASSIVE's words."""
    if "Timer" in intent:
        return "alarm"
    return next((name for prefix, name in SCENARIOS if intent.startswith(prefix)), "iot")


def sample(language: Language, *, rows_per_intent: int, seed: int) -> list[Row]:
    """Return sampled rows of all intents of a language, shuffled; the same for the same arguments.

    Every template lies in one partition only, and no utterance appears twice. An intent with three
    templates or more has rows in every partition, unless its templates say the same things; one with two
    templates lacks validation.

    Args:
        language: its templates.
        rows_per_intent: rows of an intent in all partitions together; fewer where its templates have fewer
            sentences.
        seed: of the split and of the walks.
    """
    random = Random(f"{seed} {language.locale}")
    taken: set[str] = set()
    rows: list[Row] = []
    for intent in sorted(language.templates):
        found = _intent_rows(language, intent, rows_per_intent, random, taken)
        taken.update(_key(row.text) for row in found)
        rows += found
    random.shuffle(rows)
    return rows


def _intent_rows(
    language: Language, intent: str, num_rows: int, random: Random, taken: set[str]
) -> list[Row]:
    """Sample one intent: of several divisions of its templates, the first that leaves no partition empty."""
    usable = [template for template in language.templates[intent] if _is_usable(language, template)]
    best: list[Row] = []
    for _ in range(MAX_SPLITS_TRIED):
        rows: list[Row] = []
        seen = set(taken)
        divided = _divided(usable, random)
        held_out = max(1, round(num_rows * HELD_OUT_SHARE))
        # One row each first, since templates can overlap. Then the small partitions: train can spare what
        # they take.
        for partition, members in divided.items():
            rows += _partition_rows(language, members, partition, 1, random, seen)
        for partition, members in divided.items():
            wanted = num_rows - 2 * held_out if partition == "train" else held_out
            rows += _partition_rows(language, members, partition, wanted - 1, random, seen)
        if len({row.partition for row in rows}) > len({row.partition for row in best}) or not best:
            best = rows
        if len({row.partition for row in best}) >= min(len(SPLITS), len(usable)):
            break
    return best


def _divided(usable: list[Template], random: Random) -> dict[str, list[Template]]:
    """Divide the templates of an intent at random, held-out partitions first."""
    shuffled = random.sample(usable, len(usable))
    count = max(1, round(len(shuffled) * HELD_OUT_SHARE))
    num_test = count if len(shuffled) >= 2 else 0
    num_validation = count if len(shuffled) >= 3 else 0
    return {
        "test": shuffled[:num_test],
        "validation": shuffled[num_test : num_test + num_validation],
        "train": shuffled[num_test + num_validation :],
    }


def _partition_rows(
    language: Language, members: list[Template], partition: str, num_rows: int, random: Random, seen: set[str]
) -> list[Row]:
    """Walk ``members`` until ``num_rows`` new sentences are found; they are added to ``seen``."""
    rows: list[Row] = []
    misses = 0
    while members and len(rows) < num_rows and misses < MAX_MISSES:
        template = random.choice(members)
        utterance = language.walk(template, random)
        key = _key(utterance.text)
        if not key or key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        rows.append(Row(utterance.text, template.intent, utterance.slots, partition, template.text))
    return rows


def not_everywhere(language: Language, rows: Sequence[Row]) -> list[str]:
    """Return the intents with three templates or more that lack rows in a partition."""
    found: dict[str, set[str]] = {intent: set() for intent in language.templates}
    for row in rows:
        found[row.intent].add(row.partition)
    return [
        intent
        for intent, partitions in found.items()
        if len(language.templates[intent]) >= len(SPLITS) and len(partitions) < len(SPLITS)
    ]


def _is_usable(language: Language, template: Template) -> bool:
    """Tell whether a walk can fill everything that the template refers to, whichever way it goes."""
    try:
        for seed in range(3):
            language.walk(template, Random(seed))
    except DataError:
        return False
    return True


def _key(text: str) -> str:
    """What makes two utterances the same: letters and digits without case."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def massive_rows(locale: str, rows: list[Row]) -> dict[str, list[dict[str, str]]]:
    """Return the rows by partition with MASSIVE's columns: id, locale, partition, scenario, intent, utt."""
    partitions: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for index, row in enumerate(rows):
        partitions[row.partition].append(
            {
                "id": str(index),
                "locale": locale,
                "partition": row.partition,
                "scenario": scenario(row.intent),
                "intent": row.intent,
                "utt": row.text,
            }
        )
    return partitions
