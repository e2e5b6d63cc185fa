"""``meldkit data samples``: list the sample data sets, write one as a folder."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from toolkit import collection
from toolkit.cache_folder import cache_folder
from toolkit.config.load import load_for_command
from toolkit.config.option_help import options_help
from toolkit.config.options import Options
from toolkit.data.samples.catalog import DATA, make
from toolkit.data.samples.locales import DEFAULT_LOCALES, LOCALES
from toolkit.errors import ConfigError

HELP_FLAGS = {"-h", "--help", "help"}


class SamplesConfig(Options):
    """Write a sample data set as a folder of JSON lines. Without NAME: list the data sets."""

    out: Path | None = None
    """Folder to write. Default: data/NAME in $MELDKIT_CACHE or ~/.cache/meldkit."""

    rows_per_intent: int | None = Field(None, ge=3)
    """Rows of an intent and language, all partitions together. Default: intents 200, conversations 60."""

    seed: int = Field(0, ge=0)
    """Seed of everything that is drawn."""

    locales: list[str] = Field(default_factory=lambda: list(DEFAULT_LOCALES))
    """For intents: locales in MASSIVE's codes (en-US,sq-AL), or all."""

    languages: list[str] = Field(default_factory=lambda: ["en"])
    """For conversations: language codes (en,fr), or all."""

    source: Literal["chatterbot", "intents", "both"] = "both"
    """For conversations: small talk and facts, requests to a smart home, or both."""


OPTIONS_OF_ONE = {"locales": "intents", "languages": "conversations", "source": "conversations"}
"""Options that only one of the data sets has."""


def samples(argv: Sequence[str]) -> int:
    """Run ``meldkit data samples [NAME] [--out DIR] ...`` and return the exit status."""
    if HELP_FLAGS & set(argv):
        sys.stdout.write(
            options_help("meldkit data samples [NAME] [--OPTION VALUE ...]", SamplesConfig) + "\n"
        )
        return 0
    if not argv:
        sys.stdout.write(listing())
        return 0
    from toolkit.data.samples import conversations  # hassil takes 0.3 s, and help does without

    name, *rest = argv
    if name not in DATA:
        raise collection.unknown_name("sample data set", name, DATA, hint="meldkit data samples lists them")
    loaded = load_for_command(SamplesConfig, rest)
    misplaced = [
        f"--{option} belongs to {owner}"
        for option, owner in OPTIONS_OF_ONE.items()
        if owner != name and loaded.provenance[option] != "default"
    ]
    if misplaced:
        raise ConfigError(misplaced)
    config = loaded.config
    began = time.monotonic()
    folder = make(
        name,
        config.out or cache_folder() / "data" / name,
        locales=sorted(LOCALES) if config.locales == ["all"] else config.locales,
        languages=conversations.languages() if config.languages == ["all"] else config.languages,
        source=config.source,
        rows_per_intent=config.rows_per_intent,
        seed=config.seed,
        announce=_tell,
    )
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _tell(f"{name}: {num_bytes / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")
    sys.stdout.write(f"{folder}\n")
    return 0


def listing() -> str:
    """Return the list of all data sets as text."""
    from toolkit.data.samples import conversations

    lines = ["Data sets of the collection (meldkit data samples NAME --out DIR):", ""]
    width = max(len(name) for name in DATA)
    for data in DATA.values():
        lines += [f"  {data.name:<{width}}  {data.licence}", f"      {data.summary}", ""]
    lines.append(f"Locales of intents (--locales, or all {len(LOCALES)}):")
    lines += _wrapped(sorted(LOCALES))
    lines += ["", f"Languages of conversations (--languages, or all {len(conversations.languages())}):"]
    lines += _wrapped(conversations.languages())
    lines += [
        "",
        "Templates and chats come from the packages home-assistant-intents and chatterbot-corpus (1.1 MB to",
    ]
    lines += ["fetch); the templates of sq-AL are meldkit's own.", ""]
    return "\n".join(lines)


def _wrapped(names: Sequence[str]) -> list[str]:
    lines = [" "]
    for name in names:
        if len(lines[-1]) + len(name) > 98:
            lines.append(" ")
        lines[-1] += f" {name}"
    return lines


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
