"""``meldkit data samples``: list the sample data sets, write one as a folder."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from toolkit import collection, wheels
from toolkit.data.samples import conversations
from toolkit.data.samples.catalog import DATA, make
from toolkit.data.samples.locales import DEFAULT_LOCALES, LOCALES, parse_locales


def samples(argv: Sequence[str]) -> int:
    """Run ``meldkit data samples [NAME] [--out DIR] ...`` and return the exit status."""
    parser = _parser()
    arguments = collection.read_arguments(parser, argv)
    if arguments.name is None:
        if argv:
            parser.error("the options need the NAME of a data set")
        sys.stdout.write(listing())
        return 0
    name = arguments.name
    if name not in DATA:
        raise collection.unknown_name("sample data set", name, DATA, hint="meldkit data samples lists them")
    if name == "intents" and (arguments.languages or arguments.source):
        parser.error("--languages and --source belong to conversations; intents has --locales")
    if name == "conversations" and arguments.locales:
        parser.error("--locales belongs to intents; conversations has --languages")
    began = time.monotonic()
    folder = make(
        name,
        arguments.out or wheels.cache_folder() / "data" / name,
        locales=parse_locales(arguments.locales) if arguments.locales else None,
        languages=_languages(arguments.languages) if arguments.languages else None,
        source=arguments.source or "both",
        rows_per_intent=arguments.rows_per_intent,
        seed=arguments.seed,
        announce=_tell,
    )
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _tell(f"{name}: {num_bytes / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")
    sys.stdout.write(f"{folder}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="meldkit data samples",
        description="Write a sample data set as a folder of JSON lines. Without NAME: list them.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the data set; see the list")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write. Default: data/NAME in the cache"
    )
    parser.add_argument(
        "--rows-per-intent",
        "--rows_per_intent",
        type=int,
        metavar="N",
        help="rows of an intent and language, all partitions together (intents 200, conversations 60)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn (0)")
    parser.add_argument(
        "--locales", metavar="A,B", help=f"intents: all, or some locales ({','.join(DEFAULT_LOCALES)})"
    )
    parser.add_argument("--languages", metavar="A,B", help="conversations: all, or some language codes (en)")
    parser.add_argument(
        "--source", metavar="SOURCE", help="conversations: chatterbot, intents or both (both)"
    )
    return parser


def _languages(text: str) -> list[str]:
    if text.strip().lower() == "all":
        return list(conversations.languages())
    return [name.strip() for name in text.split(",") if name.strip()]


def listing() -> str:
    """Return the list of all data sets as text."""
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
