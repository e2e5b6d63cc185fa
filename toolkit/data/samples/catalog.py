"""The sample data sets by name, and how one becomes a folder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from toolkit import collection
from toolkit.cache_folder import cache_folder
from toolkit.data.samples.locales import DEFAULT_LOCALES, LOCALES, OURS
from toolkit.errors import InputError
from toolkit.wheels import Announce, silent


@dataclass(frozen=True)
class SampleData:
    """One data set of the collection.

    Args:
        name: what the user types.
        summary: one line: what it is and what it is for.
        licence: of the text.
        rows_per_intent: default of the option.
        revision: goes up when other files are written for the same options.
    """

    name: str
    summary: str
    licence: str
    rows_per_intent: int
    revision: int = 1


DATA: dict[str, SampleData] = {
    data.name: data
    for data in (
        SampleData(
            name="intents",
            summary="requests to a voice assistant with their intents, 66 locales, in the shape of MASSIVE",
            licence="Apache-2.0",
            rows_per_intent=200,
        ),
        SampleData(
            name="conversations",
            summary="chats: small talk and facts, and smart home requests answered in JSON",
            licence="BSD and Apache-2.0",
            rows_per_intent=60,
        ),
    )
}
"""The data sets by name."""


def make(
    name: str,
    out_dir: Path | str,
    *,
    locales: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    source: str = "both",
    rows_per_intent: int | None = None,
    seed: int = 0,
    announce: Announce = silent,
) -> Path:
    """Write the data set ``name`` and return its folder; a complete one with the same options is kept.

    The folder appears as a whole or not at all, and its bytes depend on the arguments only.

    Args:
        name: a key of :data:`DATA`.
        out_dir: where; made with its parents.
        locales: of ``intents``, e.g. ``["en-US", "sq-AL"]``. Default: the ten with names in their own
            language.
        languages: of ``conversations``, e.g. ``["en", "fr"]``. Default: English.
        source: of ``conversations``: chatterbot, intents or both.
        rows_per_intent: rows of an intent and language, all partitions together.
        seed: of everything that is drawn.
        announce: receives a line before work that takes a while.

    Raises:
        InputError: an unknown name, locale, language or source; no rows; rows_per_intent under 3.
        RunDirectoryError: ``out_dir`` holds something else.
        MeldkitError: a wheel cannot be fetched.
    """
    # Imported where it is used, here and below: hassil takes 0.3 s, and help needs the names only.
    from toolkit.data.samples import conversations, intents

    if name not in DATA:
        raise collection.unknown_name("sample data set", name, DATA, hint="meldkit data samples lists them")
    num_rows = DATA[name].rows_per_intent if rows_per_intent is None else rows_per_intent
    if num_rows < len(intents.SPLITS):
        raise InputError(
            f"--rows-per-intent {num_rows} cannot fill three partitions",
            hint="3 at least; 10 gives 8, 1 and 1",
        )
    facts: dict[str, Any] = {"kind": "sample data", "name": name, "revision": DATA[name].revision}
    facts |= {"rows_per_intent": num_rows, "seed": seed}
    if name == "intents":
        chosen = facts["locales"] = _checked("locale", locales or DEFAULT_LOCALES, LOCALES)
        build = partial(_build_intents, locales=chosen, num_rows=num_rows, seed=seed, announce=announce)
    else:
        codes = _checked("language of conversations", languages or ["en"], conversations.languages())
        [source] = _checked("source", [source], conversations.SOURCES)
        facts |= {"languages": codes, "source": source}
        build = partial(
            _build_conversations,
            languages=codes,
            source=source,
            num_rows=num_rows,
            seed=seed,
            announce=announce,
        )
    return collection.make_folder(Path(out_dir), facts, build, announce=announce)


def sample_name(source: str) -> tuple[str, str] | None:
    """Name and variant in ``sample:NAME`` or ``sample:NAME:VARIANT``; None for data from elsewhere.

    A variant is a locale of ``intents`` or a language of ``conversations``; "" for what is made without.

    Raises:
        InputError: there is no such data set or variant.
    """
    if not source.startswith(collection.SAMPLE_PREFIX):
        return None
    name, _, variant = source.removeprefix(collection.SAMPLE_PREFIX).partition(":")
    if name not in DATA:
        raise collection.unknown_name("sample data set", name, DATA, hint="meldkit data samples lists them")
    if variant and name == "intents":
        _checked("locale", [variant], LOCALES)
    elif variant:
        from toolkit.data.samples import conversations

        _checked("language of conversations", [variant], conversations.languages())
    return name, variant


def sample_folder(source: str, *, announce: Announce = silent) -> Path | None:
    """The folder of ``sample:NAME[:VARIANT]`` in meldkit's cache, made where it is missing; None for data from
    elsewhere.

    Raises:
        InputError, RunDirectoryError, MeldkitError: as :func:`make`.
    """
    found = sample_name(source)
    if found is None:
        return None
    name, variant = found
    folder = cache_folder() / "data" / f"{name}-{variant or 'default'}"
    return make(
        name,
        folder,
        locales=[variant] if variant and name == "intents" else None,
        languages=[variant] if variant and name == "conversations" else None,
        announce=silent if collection.is_there(folder) else announce,
    )


def _checked(kind: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return ``names`` sorted and each once.

    Raises:
        InputError: one is not known; the message has the nearest ones.
    """
    known = set(known)
    for name in names:
        if name not in known:
            hint = f"known: {', '.join(sorted(known))}"
            raise collection.unknown_name(kind, name, known, hint=hint)
    return sorted(set(names))


def _build_intents(
    folder: Path, locales: Sequence[str], num_rows: int, seed: int, announce: Announce
) -> None:
    from toolkit.data.samples import card, intents, templates

    counts: dict[str, dict[str, int]] = {}
    exceptions: list[str] = []
    home_languages: dict[str, str] = {}
    for index, locale in enumerate(locales):
        language = templates.load(locale, announce=announce)
        rows = intents.sample(language, rows_per_intent=num_rows, seed=seed)
        partitions = intents.massive_rows(locale, rows)
        (folder / locale).mkdir()
        for name, members in partitions.items():
            write_jsonl(folder / locale / f"{name}.jsonl", members)
        exceptions += [f"{locale} {intent}" for intent in intents.not_everywhere(language, rows)]
        counts[locale] = {"intents": len({row.intent for row in rows})}
        counts[locale] |= {name: len(members) for name, members in partitions.items()}
        home_languages[locale] = language.code if locale in OURS else language.home.language
        num_intents = counts[locale]["intents"]
        announce(f"[{index + 1}/{len(locales)}] {locale}: {len(rows):,} rows of {num_intents} intents")
    text = card.intents_card(counts, home_languages, exceptions, rows_per_intent=num_rows, seed=seed)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _build_conversations(
    folder: Path, languages: Sequence[str], source: str, num_rows: int, seed: int, announce: Announce
) -> None:
    from toolkit.data.samples import card, conversations

    partitions = conversations.rows(
        languages, source=source, rows_per_intent=num_rows, seed=seed, announce=announce
    )
    if not all(partitions.values()):
        raise InputError(
            f"--source {source} has no rows in {', '.join(languages)}",
            hint="--source both takes what there is",
        )
    for name, members in partitions.items():
        write_jsonl(folder / f"{name}.jsonl", members)
    announce(", ".join(f"{name} {len(members):,} rows" for name, members in partitions.items()))
    text = card.conversations_card(partitions, rows_per_intent=num_rows, seed=seed)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, as UTF-8."""
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
