"""The README of a sample data set: what it is, how it was made, whose text it is, how much."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.data.samples import chatterbot, templates
from toolkit.data.samples.conversations import SYSTEM_PROMPT
from toolkit.data.samples.intents import SPLITS
from toolkit.data.samples.locales import OURS


def intents_card(
    counts: Mapping[str, Mapping[str, int]],
    home_languages: Mapping[str, str],
    *,
    rows_per_intent: int,
    seed: int,
) -> str:
    """Return the card of the intents.

    Args:
        counts: locale to number of intents and of rows by partition.
        home_languages: locale to the language of its rooms and devices.
    """
    lines = ["---", "license: apache-2.0", "task_categories: [text-classification]"]
    lines += [f"language: [{', '.join(sorted({locale.split('-')[0] for locale in counts}))}]", "configs:"]
    for locale in counts:
        lines += [f"- config_name: {locale}", "  data_files:"]
        for name in SPLITS:
            lines += [f"  - split: {name}", f"    path: {locale}/{name}.jsonl"]
    own = sorted(set(counts) & set(OURS))
    english = sorted(
        locale
        for locale, language in home_languages.items()
        if language == "en" and locale.split("-")[0] != "en"
    )
    lines += [
        "---",
        "",
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
        "twice in a locale. An intent with three templates or more has rows in all partitions.",
        "",
        f"Made by `meldkit data samples intents --rows-per-intent {rows_per_intent} --seed {seed}`.",
        "",
        "## Sources",
        "",
        f"- Templates: {_package(templates.HOME_ASSISTANT_INTENTS)}; read with hassil (Apache-2.0).",
        "- Names of rooms, floors and devices: written for meldkit, Apache-2.0.",
    ]
    if own:
        lines += [
            f"- **{', '.join(own)}: the templates were written for meldkit** (Apache-2.0). Neither",
            "  Home Assistant nor MASSIVE is their source, and they are fewer.",
        ]
    if english:
        lines.append(f"- Rooms and devices have English names in: {', '.join(english)}.")
    lines += ["", "## Rows", "", "| locale | intents | train | validation | test |", "|---|---|---|---|---|"]
    for locale, count in counts.items():
        lines.append(
            f"| {locale} | {count['intents']} | " + " | ".join(f"{count[name]}" for name in SPLITS) + " |"
        )
    total = {name: sum(count[name] for count in counts.values()) for name in SPLITS}
    lines.append("| all | | " + " | ".join(f"{total[name]}" for name in SPLITS) + " |")
    return "\n".join(lines) + "\n"


def conversations_card(
    partitions: Mapping[str, Sequence[Mapping[str, Any]]], *, rows_per_intent: int, seed: int
) -> str:
    """Return the card of the conversations.

    Args:
        partitions: the rows by partition.
    """
    counts = Counter(
        (row["source"], row["language"], partition) for partition, rows in partitions.items() for row in rows
    )
    kinds = sorted({(source, language) for source, language, _ in counts})
    packages = {source for source, _ in kinds}
    lines = ["---", "license: other", "task_categories: [text-generation]"]
    lines += [f"language: [{', '.join(sorted({language for _, language in kinds}))}]", "configs:"]
    lines += ["- config_name: default", "  data_files:"]
    for name in SPLITS:
        lines += [f"  - split: {name}", f"    path: {name}.jsonl"]
    lines += [
        "---",
        "",
        "# Conversations",
        "",
        "Chats for training a causal language model: columns `messages` (role and content), `source`,",
        "`language`, `topic`.",
        "",
        "## How it was made",
        "",
    ]
    if chatterbot.CHATTERBOT_CORPUS.package in packages:
        lines += [
            "- **Small talk and facts** from chatterbot-corpus. Repeated and empty answers are left out; a",
            f"  question keeps {chatterbot.MAX_ANSWERS} answers at most. One to three exchanges on a topic",
            "  make one conversation; only the corpus's own dialogues are connected in content. A question,",
            "  or an answer of more than a few words, lies in one partition only. It is the humour of an old",
            "  chat bot, and partly wrong.",
        ]
    if packages - {chatterbot.CHATTERBOT_CORPUS.package}:
        lines += [
            "- **Requests to a smart home**, sampled from sentence templates, answered in JSON: the intent,",
            "  then its slots by name. Each template lies in one partition only. One system prompt for all:",
            "",
            f"  > {SYSTEM_PROMPT}",
        ]
    lines += [
        "",
        f"Made by `meldkit data samples conversations --rows-per-intent {rows_per_intent} --seed {seed}`.",
        "",
        "## Sources",
        "",
    ]
    if chatterbot.CHATTERBOT_CORPUS.package in packages:
        lines.append(f"- {_package(chatterbot.CHATTERBOT_CORPUS)}.")
    if templates.HOME_ASSISTANT_INTENTS.package in packages:
        lines.append(f"- {_package(templates.HOME_ASSISTANT_INTENTS)}; read with hassil (Apache-2.0).")
    if packages - {chatterbot.CHATTERBOT_CORPUS.package}:
        lines.append("- Names of rooms, floors and devices: written for meldkit, Apache-2.0.")
    if "meldkit" in packages:
        lines.append("- **The Albanian templates were written for meldkit**, Apache-2.0.")
    lines += ["", "## Rows", "", "| source | language | train | validation | test |", "|---|---|---|---|---|"]
    for source, language in kinds:
        cells = " | ".join(str(counts[source, language, name]) for name in SPLITS)
        lines.append(f"| {source} | {language} | {cells} |")
    return "\n".join(lines) + "\n"


def _package(wheel: Any) -> str:
    return f"[{wheel.package} {wheel.version}]({wheel.url}), {wheel.licence}"
