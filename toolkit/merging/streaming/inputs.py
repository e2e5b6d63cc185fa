"""The files that a merge depends on: still those that were planned with, not too many to be open, told apart later."""

import resource
from collections.abc import Sequence
from pathlib import Path

from toolkit.durable import file_sha256
from toolkit.errors import MergeError
from toolkit.merging.plan import MergePlan, tensor_readers
from toolkit.merging.streaming.safetensors_file import FileIdentity, FileReader

# Of a folder that gives no weights these count: configurations, vocabularies, templates.
SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# Larger ones are told by size and time alone.
MAX_HASHED_BYTES = 1 << 20
# Descriptors that a file may need (a mapping keeps one of its own), and that everything else needs.
DESCRIPTORS_EACH, OTHER_DESCRIPTORS = 2, 100


def weights_files(plan: MergePlan) -> list[FileIdentity]:
    """Every file whose tensors are read, as it was when its header was.

    Raises:
        ModelError: one is missing.
        MergeError: one was replaced since.
    """
    files = {identity.path: identity for model in plan.inputs for identity in model.identities}
    for tensor in plan.tensors:
        for reader in tensor_readers(tensor):
            if type(reader) is FileReader:
                files[reader.file.path] = reader.file.header.identity
    for path, planned in files.items():
        if FileIdentity.found(path) != planned:
            raise MergeError(
                f"{path} was changed since the merge was planned",
                hint="plan it again: its tensors may be others",
            )
    return list(files.values())


def side_files(plan: MergePlan) -> list[FileIdentity]:
    """What else the result depends on. Raises ModelError where a file is missing."""
    found: dict[Path, None] = {}
    for path in plan.depends_on:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SIDE_SUFFIXES and p.is_file())
            found |= dict.fromkeys(inside)
        else:
            found[path] = None
    return [FileIdentity.found(path) for path in found]


def side_facts(identity: FileIdentity) -> list[object]:
    """What tells one content of a side file from another, without much reading."""
    is_small = identity.num_bytes <= MAX_HASHED_BYTES
    return [
        str(identity.path.resolve()),
        identity.num_bytes,
        identity.mtime_ns,
        file_sha256(identity.path) if is_small else None,
    ]


def allow_open_files(files: Sequence[object], num_written: int) -> None:
    """Raise this process's soft limit of open files where a merge of many shards would exceed it."""
    needed = DESCRIPTORS_EACH * len(files) + num_written + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, needed) and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
