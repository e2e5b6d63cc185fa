"""What the sample models and the sample data sets share: names, and folders that are whole or not there."""

import contextlib
import difflib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit import durable
from toolkit.config.names import did_you_mean
from toolkit.errors import InputError, RunDirectoryError
from toolkit.wheels import Announce, silent

SAMPLE_PREFIX = "sample:"
"""``sample:NAME`` in the place of a model or of data: a part of the collection, made on first use."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str) -> InputError:
    """Return the error for a name that is not in the collection; it shows the nearest names that are."""
    if name.startswith("-"):
        return InputError(f"the name of a {kind} comes first, then {name}", hint=hint)
    meant = did_you_mean(name, sorted(known))
    if not meant:
        beginnings = {candidate[: len(name) + 1].lower(): candidate for candidate in sorted(known)}
        near = difflib.get_close_matches(name.lower(), beginnings, n=1)
        meant = f"; did you mean '{beginnings[near[0]]}'?" if near else ""
    return InputError(f"there is no {kind} named {name!r}{meant}", hint=hint)


def make_folder(
    out_dir: Path,
    facts: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    announce: Announce = silent,
) -> Path:
    """Let ``build`` fill a new folder and put it at ``out_dir`` as a whole; keep one that is there already.

    Args:
        out_dir: the folder that is wanted.
        facts: what the content depends on (name, options, versions); JSON values. They are kept in its
            manifest.
        build: writes the content into the empty folder that it is given.

    Raises:
        RunDirectoryError: ``out_dir`` holds something else; it is left alone.
    """
    out_dir = out_dir.expanduser().absolute()
    if _is_kept(out_dir, dict(facts)):
        announce(f"{out_dir} is complete already and is kept")
        return out_dir
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot make the folder {out_dir.parent}: {error.strerror}") from error
    # Two processes that want the same folder: one builds, the other waits and keeps what it finds.
    with _alone_in(out_dir.parent):
        if _is_kept(out_dir, dict(facts)):
            announce(f"{out_dir} is complete already and is kept")
            return out_dir
        prefix = f"{durable.STAGING_PREFIX}{out_dir.name}-"
        for leftover in out_dir.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = out_dir.with_name(f"{prefix}{uuid.uuid4().hex[:8]}")
        staging.mkdir()
        try:
            build(staging)
            if out_dir.exists():
                out_dir.rmdir()  # empty: looked at above
            durable.commit_folder(staging, out_dir, facts)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def is_there(folder: Path) -> bool:
    """Whether something complete lies at ``folder`` already."""
    return (folder / durable.MANIFEST_NAME).is_file()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` itself: no file is left beside the result, and none lies in a cache that
    the result does not need. It goes with a killed process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_kept(out_dir: Path, facts: dict[str, Any]) -> bool:
    """Tell whether ``out_dir`` is the folder that is wanted; False when it has to be made.

    Only names and sizes are compared, so that the answer costs nothing for a model of any size.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    advice = "choose another folder for --out, or remove this one first"
    if not out_dir.is_dir():
        raise RunDirectoryError(f"{out_dir} is a file", hint=advice)
    try:
        manifest = json.loads((out_dir / durable.MANIFEST_NAME).read_text(encoding="utf-8"))
        found, files = manifest["facts"], manifest["files"]
        sizes = {name: entry["num_bytes"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{out_dir} holds files that the sample collection did not write", hint=advice
        ) from error
    if found != json.loads(json.dumps(facts)):
        keys = [key for key in sorted({*found, *facts}) if found.get(key) != facts.get(key)]
        differences = ", ".join(f"{key} {found.get(key)!r} instead of {facts.get(key)!r}" for key in keys)
        raise RunDirectoryError(
            f"{out_dir} is complete, but made with other choices: {differences}", hint=advice
        )
    for name, num_bytes in sizes.items():
        path = out_dir / name
        if not path.is_file() or path.stat().st_size != num_bytes:
            raise RunDirectoryError(f"{path} is missing or was changed since it was made", hint=advice)
    return True
