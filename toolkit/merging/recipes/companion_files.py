"""Files beside the weights: read with errors that name them, copied by content.

A link is followed only within its folder, or into the blobs of the hub's cache, where the files of a snapshot lie.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from toolkit.errors import MergeError, ModelError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path)) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy_file(origin: Path, name: str, folder: Path) -> None:
    """Copy the content of a file that is there."""
    path = origin / name
    if not path.is_file():
        return
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in _allowed(origin)):
        raise MergeError(
            f"{path} is a link to {target}, outside of the model's folder",
            hint="copy the file there in place of the link",
        )
    try:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, folder / name)
        (folder / name).chmod(0o644)
    except OSError as error:
        raise MergeError(f"{path} cannot be copied: {error.strerror}") from error


def _allowed(origin: Path) -> list[Path]:
    """Where links of a folder may lead: into it, and from a snapshot of the hub's cache to the blobs of the model."""
    own = origin.resolve()
    if own.parent.name == "snapshots":
        return [own, own.parent.parent / "blobs"]
    return [own]
