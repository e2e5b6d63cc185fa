"""Tokenised data on disk, found again by its content.

An entry is a folder named after a SHA-256 of rows, tokenizer, template, options and the code of this package,
committed as a whole by :mod:`toolkit.durable`. A damaged entry is thrown away and built again. Two processes
may build the same entry at once: both results are the same, the first commit stays.
"""

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit import durable
from toolkit.cache_folder import cache_folder as folder_of_meldkit
from toolkit.errors import CheckpointError

FACTS_NAME = "facts.json"
LEFTOVER_AGE_SECONDS = 24 * 3600.0


def cache_folder(chosen: Path | None) -> Path:
    """``tokenised/`` in --data-cache, else in meldkit's cache."""
    return (chosen.expanduser() if chosen else folder_of_meldkit()) / "tokenised"


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What decides how a tokenizer tokenises and renders, as JSON values and hashes."""
    if tokenizer is None:
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What stands before are the truncation and padding of the last call, which are no part of the
        # tokenizer.
        text = backend.to_str()
        content = text[text.index('"added_tokens"') :]
    else:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "class": type(tokenizer).__name__,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
        "template_sha256": template_sha256(tokenizer),
    }


def template_sha256(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def code_sha256() -> str:
    """Hash of the modules of this folder, which decide what an entry holds: a change of one makes older entries
    unreachable."""
    hasher = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.name.encode() + b"\x00" + path.read_bytes())
    return hasher.hexdigest()


def entry_key(
    rows: Iterable[Iterable[Mapping[str, Any]]], facts: Mapping[str, Any], sources: Sequence[str]
) -> str:
    """Name of an entry: SHA-256 of the rows of each split, in order, of ``facts``, of the places that its
    report names, of versions and of the code."""
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    around = [facts, list(sources), versions, code_sha256()]
    hasher = hashlib.sha256(json.dumps(around, sort_keys=True, default=str).encode())
    encode = json.JSONEncoder(sort_keys=True, default=str, ensure_ascii=False).encode
    for split in rows:
        hasher.update(b"\x00split")
        for row in split:
            # Lone surrogates are legal in JSON and not in UTF-8.
            hasher.update(encode(row).encode("utf-8", "surrogatepass") + b"\x01")
    return hasher.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A committed entry: ``train.arrow``, perhaps ``evaluation.arrow``, and its facts."""

    folder: Path
    facts: dict[str, Any]


def find(folder: Path, key: str) -> Entry | None:
    """Return the entry of ``key``, or None; a damaged one is removed."""
    entry = folder / key
    if not entry.is_dir():
        return None
    try:
        durable.verify_folder(entry)
        return Entry(entry, json.loads((entry / FACTS_NAME).read_text(encoding="utf-8")))
    except (CheckpointError, OSError, LookupError, TypeError, ValueError):
        # Another process may have removed it first.
        with contextlib.suppress(OSError):
            durable.discard_folder(entry)
        return None


def store(folder: Path, key: str, datasets_by_name: Mapping[str, Any], facts: Mapping[str, Any]) -> Entry:
    """Write an entry and return it; when another process was first, its entry is returned.

    Args:
        folder: the cache.
        key: of :func:`entry_key`.
        datasets_by_name: name -> ``datasets.Dataset``.
        facts: JSON values that are kept with it.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear_old_leftovers(folder)
    staged = folder / f"{durable.STAGING_PREFIX}{key[:16]}-{uuid.uuid4().hex[:8]}"
    staged.mkdir()
    try:
        for name, dataset in datasets_by_name.items():
            _write_arrow(staged / f"{name}.arrow", dataset)
        # In a file of its own, since the manifest vouches for every file but itself.
        durable.write_json(staged / FACTS_NAME, dict(facts))
        durable.commit_folder(staged, folder / key, {})
    except (CheckpointError, OSError):
        existing = find(folder, key)
        if existing is None:
            raise
        return existing
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Entry(folder / key, dict(facts))


def _write_arrow(path: Path, dataset: Any) -> None:
    # Dataset.save_to_disk would do, but for the progress bars that it shows.
    import pyarrow

    table = dataset.data.table
    with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def load(entry: Entry, name: str) -> Any | None:
    """The ``datasets.Dataset`` of that name in an entry, memory-mapped, or None."""
    import datasets

    path = entry.folder / f"{name}.arrow"
    return datasets.Dataset.from_file(str(path)) if path.is_file() else None


def _clear_old_leftovers(folder: Path) -> None:
    """Remove what killed processes left behind; younger folders may belong to a process that is at work."""
    for path in folder.iterdir():
        if path.name.startswith((durable.STAGING_PREFIX, durable.TRASH_PREFIX)):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
