"""The README of a sample data set: what it is, how it was made, whose text it is, how much."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolkit.data.samples import chatterbot, templates
from toolkit.data.samples.conversations import SYSTEM_PROMPT
from toolkit.data.samples.intents import SPLITS
from toolkit.data.samples.locales import OURS

OUR_NAMES = "- Names of rooms, floors and devices: written for meldkit, Apache-2.0."

ABOUT_CHATS = [
    "- **Small talk and facts** from chatterbot-corpus. Repeated and empty answers are left out; a question",
    f"  keeps {chatterbot.MAX_ANSWERS} answers at most. One to three exchanges on a topic make one",
    "  conversation; only the corpus's own dialogues are connected in content. A question, or an answer of",
    "  more than a few words, lies in one partition only. It is the humour of an old chat bot, and partly",
    "  wrong.",
]

ABOUT_REQUESTS = [
    "- **Requests to a smart home**, sampled from sentence templates, answered in JSON: the intent, then its",
    "  slots by name. Each template lies in one partition only. One system prompt for all:",
    "",
    f"  > {SYSTEM_PROMPT}",
]


def intents_card(
    counts: Mapping[str, Mapping[str, int]],
    home_languages: Mapping[str, str],
    exceptions: Sequence[str],
    *,
    rows_per_intent: int,
    seed: int,
) -> str:
    """Return the card of the intents.

    Args:
        counts: locale to number of intents and of rows by partition.
        home_languages: locale to the language of its rooms and devices.
        exceptions: "locale intent" of those that lack rows in a partition in spite of enough templates.
    """
    configs = {locale: {name: f"{locale}/{name}.jsonl" for name in SPLITS} for locale in counts}
    lines = _metadata(
        "apache-2.0", "text-classification", {locale.split("-")[0] for locale in counts}, configs
    )
    lines += [
        "# Intents of a voice assistant",
        "",
        "Requests to a smart home with the intent that each one means, one folder a locale, in the shape of",
        "[MASSIVE](https://huggingface.co/datasets/AmazonScience/massive): columns `id`, `locale`,",
        "`partition`, `scenario`, `intent`, `utt`. The intents are those of Home Assistant.",
        "",
        "## How it was made",
        "",
        "By a seeded random walk through sentence templates: nobody said these sentences. Some are",
        "ungrammatical, because names are put in without inflection. Each **template** lies in one partition",
        "only, so that held-out rows are ways of speaking that training has not seen; no utterance appears",
        "twice in a locale. An intent with three templates or more has rows in all partitions"
        + (f", except {', '.join(exceptions)}." if exceptions else "."),
        "",
        f"Made by `meldkit data samples intents --rows-per-intent {rows_per_intent} --seed {seed}`.",
        "",
        "## Sources",
        "",
        f"- Templates: {_package(templates.HOME_ASSISTANT_INTENTS)}; read with hassil (Apache-2.0).",
        OUR_NAMES,
        *_exceptional_locales(home_languages),
        *_table(
            "locale | intents", {(locale, str(count["intents"])): count for locale, count in counts.items()}
        ),
    ]
    return "\n".join(lines) + "\n"


def _exceptional_locales(home_languages: Mapping[str, str]) -> list[str]:
    lines = []
    own = sorted(set(home_languages) & set(OURS))
    if own:
        lines += [
            f"- **{', '.join(own)}: the templates were written for meldkit** (Apache-2.0). Neither",
            "  Home Assistant nor MASSIVE is their source.",
        ]
    english = [
        locale
        for locale, language in home_languages.items()
        if language == "en" and not locale.startswith("en-")
    ]
    if english:
        lines.append(f"- Rooms and devices have English names in: {', '.join(sorted(english))}.")
    return lines


def conversations_card(
    partitions: Mapping[str, Sequence[Mapping[str, Any]]], *, rows_per_intent: int, seed: int
) -> str:
    """Return the card of the conversations.

    Args:
        partitions: the rows by partition.
    """
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for name, rows in partitions.items():
        for row in rows:
            counts.setdefault((row["source"], row["language"]), Counter())[name] += 1
    sources = {source for source, _ in counts}
    has_chats = chatterbot.CHATTERBOT_CORPUS.package in sources
    has_requests = bool(sources - {chatterbot.CHATTERBOT_CORPUS.package})
    configs = {"default": {name: f"{name}.jsonl" for name in SPLITS}}
    lines = _metadata("other", "text-generation", {language for _, language in counts}, configs)
    lines += [
        "# Conversations",
        "",
        "Chats for training a causal language model: columns `messages` (role and content), `source`,",
        "`language`, `topic`.",
        "",
        "## How it was made",
        "",
        *(ABOUT_CHATS if has_chats else []),
        *(ABOUT_REQUESTS if has_requests else []),
        "",
        f"Made by `meldkit data samples conversations --rows-per-intent {rows_per_intent} --seed {seed}`.",
        "",
        "## Sources",
        "",
    ]
    if has_chats:
        lines.append(f"- {_package(chatterbot.CHATTERBOT_CORPUS)}.")
    if templates.HOME_ASSISTANT_INTENTS.package in sources:
        lines.append(f"- {_package(templates.HOME_ASSISTANT_INTENTS)}; read with hassil (Apache-2.0).")
    if has_requests:
        lines.append(OUR_NAMES)
    if "meldkit" in sources:
        lines.append("- **The Albanian templates were written for meldkit**, Apache-2.0.")
    lines += _table("source | language", dict(sorted(counts.items())))
    return "\n".join(lines) + "\n"


def _metadata(
    licence: str, task: str, languages: Iterable[str], configs: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Return the front matter with which ``datasets`` and the hub find the splits."""
    lines = ["---", f"license: {licence}", f"task_categories: [{task}]"]
    # Quoted: "no" is a truth value in YAML.
    lines += ["language: [" + ", ".join(f'"{code}"' for code in sorted(languages)) + "]", "configs:"]
    for config, files in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for name, path in files.items():
            lines += [f"  - split: {name}", f"    path: {path}"]
    return [*lines, "---", ""]


def _table(head: str, counts: Mapping[tuple[str, ...], Mapping[str, int]]) -> list[str]:
    """Return the number of rows as a table: the key's parts, the partitions, and a line of sums."""
    num_columns = len(SPLITS) + head.count("|") + 1
    lines = ["", "## Rows", "", f"| {head} | {' | '.join(SPLITS)} |", "|---" * num_columns + "|"]
    for key, count in counts.items():
        lines.append("| " + " | ".join([*key, *(str(count[name]) for name in SPLITS)]) + " |")
    if len(counts) > 1:
        sums = [str(sum(count[name] for count in counts.values())) for name in SPLITS]
        lines.append("| " + " | ".join(["all", *[""] * head.count("|"), *sums]) + " |")
    return lines


def _package(wheel: Any) -> str:
    return f"[{wheel.package} {wheel.version}]({wheel.url}), {wheel.licence}"
