"""Chat data for a language model: small talk and facts, and requests to a smart home answered in JSON."""

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from toolkit.data.samples import chatterbot, templates
from toolkit.data.samples.intents import SPLITS, Row, sample, scenario
from toolkit.data.samples.locales import LOCALES
from toolkit.wheels import Announce, silent

SYSTEM_PROMPT = "You control a smart home. Reply to each request with one line of JSON: intent, then slots."
"""The one system prompt of all rows that are made from intents."""

INTENT_LOCALES = {
    code.split("-")[0] if code not in ("zh-TW", "zh-HK", "pt-BR", "de-CH") else code: locale
    for locale, code in LOCALES.items()
    if code != "sr-Latn"
}
"""Language code to the locale of its intents."""

SOURCES = ("chatterbot", "intents", "both")


def languages() -> tuple[str, ...]:
    """Return the codes of all languages that have rows of one source at least."""
    return tuple(sorted({*chatterbot.FOLDERS, *INTENT_LOCALES}))


def rows(
    codes: Sequence[str], *, source: str, rows_per_intent: int, seed: int, announce: Announce = silent
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by partition, shuffled: messages, source, language, topic.

    Args:
        codes: language codes.
        source: one of :data:`SOURCES`.
        rows_per_intent: requests of each intent, all partitions together.
        seed: of everything that is drawn.
    """
    partitions: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for code in codes:
        if source != "intents" and code in chatterbot.FOLDERS:
            for dialogue in chatterbot.conversations(code, seed=seed, announce=announce):
                messages = [
                    {"role": "assistant" if index % 2 else "user", "content": turn}
                    for index, turn in enumerate(dialogue.turns)
                ]
                row = _row(messages, chatterbot.CHATTERBOT_CORPUS.package, code, dialogue.topic)
                partitions[dialogue.partition].append(row)
        if source != "chatterbot" and code in INTENT_LOCALES:
            language = templates.load(INTENT_LOCALES[code], announce=announce)
            origin = templates.source_name(language.locale)
            for request in sample(language, rows_per_intent=rows_per_intent, seed=seed):
                messages = [
                    {"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": request.text},
                    {"role": "assistant", "content": answer(request)},
                ]
                partitions[request.partition].append(_row(messages, origin, code, scenario(request.intent)))
    for name, members in partitions.items():
        Random(f"{seed} conversations {name}").shuffle(members)
    return partitions


def answer(request: Row) -> str:
    """Return the JSON line for a request: the intent first, then the slots by name."""
    slots = {name: request.slots[name] for name in sorted(request.slots)}
    return json.dumps({"intent": request.intent, **slots}, ensure_ascii=False)


def _row(messages: list[dict[str, str]], source: str, language: str, topic: str) -> dict[str, Any]:
    return {"messages": messages, "source": source, "language": language, "topic": topic}
