"""Files and folders that either are complete or are not there.

The one commit protocol of the project: write beside, fsync, rename, fsync the folder. A folder that is
committed holds ``manifest.json`` with the size and the SHA-256 of each of its files, written last.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
HASHING_THREADS = 4
"""Files that are hashed at a time; each thread does about 1.5 GB a second."""


def sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder (a rename without this can be lost in a power cut)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8): a reader sees the old file or the new one, no part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file ``path`` by ``content``, as :func:`write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{STAGING_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with :func:`write_text`. NaN and infinity are refused: not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def commit_folder(staged: Path, final: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the folder ``staged`` into the complete folder ``final`` and return its manifest.

    Args:
        staged: a folder on the same file system as ``final``; nothing else writes into it any more.
        final: must not exist.
        facts: JSON values that are kept in the manifest (step, parent, ...).

    Raises:
        CheckpointError: ``final`` exists.
        OSError: the disk is full or fails; ``final`` then does not exist.
    """
    if final.exists():
        raise CheckpointError(f"{final} exists already and is never overwritten")
    paths = sorted(staged.rglob("*"))
    files = [path for path in paths if not path.is_dir()]
    digests = _sync_and_hash(files)
    content = {
        path.relative_to(staged).as_posix(): {"num_bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = {"facts": dict(facts), "files": content}
    write_json(staged / MANIFEST_NAME, manifest)
    for folder in [staged, *(path for path in paths if path.is_dir())]:
        sync(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(staged, final)
    sync(final.parent)
    return manifest


def _sync_and_hash(files: Sequence[Path]) -> list[str]:
    """Make files durable and return their digests: the disk writes while they are hashed."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = pool.map(file_sha256, files)
        for path in files:
            sync(path)
        return list(digests)


def verify_folder(folder: Path) -> dict[str, Any]:
    """Return the manifest of a committed folder after comparing every file with it.

    Raises:
        CheckpointError: no manifest, or a file is missing, added or changed; the message names the first.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        expected = {name: (entry["num_bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST_NAME} is missing or damaged ({error})") from error
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {
        MANIFEST_NAME
    }
    for name in sorted(present | set(expected)):
        path = folder / name
        if name not in present:
            raise CheckpointError(f"{path} is missing")
        if name not in expected:
            raise CheckpointError(f"{path} is not part of the checkpoint that was committed")
        num_bytes, sha256 = expected[name]
        if path.stat().st_size != num_bytes or file_sha256(path) != sha256:
            raise CheckpointError(f"{path} differs from the checkpoint that was committed")
    return manifest


def discard_folder(folder: Path) -> None:
    """Delete a committed folder: renamed first, so that a half-deleted one never looks complete."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, trash)
    sync(folder.parent)
    shutil.rmtree(trash)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left behind in ``folder`` (staged and half-deleted files and folders)."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith((STAGING_PREFIX, TRASH_PREFIX)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
