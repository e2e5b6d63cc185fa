"""What of a merge is finished and durable, so that a killed one goes on: lines of JSON in the staging folder.

    {"digest": "..."}                                       of everything that determines the result
    {"places": [[0, 17], [40, 41]], "findings": {...}}      places 0 to 16 and 40 are in the file and synced

A line is written after the data it speaks of is synced, so it may be lost but never wrong. A last line that was cut off
is ignored.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import MergeError
from toolkit.merging.plan import MergePlan, OutputTensor, tensor_readers
from toolkit.merging.streaming.compute import Findings
from toolkit.merging.streaming.inputs import side_facts
from toolkit.merging.streaming.layout import Layout, Place
from toolkit.merging.streaming.safetensors_file import FileIdentity, header_sha256

PROGRESS_NAME = ".progress.jsonl"
# Of the time since the last sync, at most this part goes into the next one.
MAX_SYNC_SHARE = 0.05


def plain(value: Any) -> Any:
    """A parameter as JSON: arrays as lists, paths as text, numbers exactly."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def parameter_groups(places: Sequence[Place]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Which group each tensor belongs to, and the method and parameters that the tensors of a group share."""
    names: list[str] = []
    groups: dict[str, dict[str, Any]] = {}
    known: dict[str, str] = {}
    texts: dict[int, str] = {}  # many tensors share one mapping of parameters
    for place in places:
        tensor = place.tensor
        method = "copy" if tensor.method is None else tensor.method.name
        text = texts.get(id(tensor.parameters))
        if text is None:
            text = texts[id(tensor.parameters)] = json.dumps(plain(tensor.parameters), sort_keys=True)
        key = f"{method} {len(tensor.models)} {tensor.dtype} {text}"
        name = known.setdefault(key, str(len(known)))
        if name not in groups:
            facts = {"method": method, "parameters": json.loads(text), "num_models": len(tensor.models)}
            groups[name] = facts | {"dtype": tensor.dtype, "num_tensors": 0, "example": tensor.name}
        groups[name]["num_tensors"] += 1
        names.append(name)
    return names, groups


def digest_of(
    plan: MergePlan,
    layout: Layout,
    inputs: Iterable[FileIdentity],
    beside: Iterable[FileIdentity],
    *,
    device: str,
    non_finite: str,
) -> str:
    """SHA-256 of everything that determines the bytes of the result: a merge goes on only where it is the same.

    Args:
        plan: of the merge.
        layout: of the result.
        inputs: weights files.
        beside: files that matter too: configurations, tokenizers.
        device: where methods compute that need whole tensors.
        non_finite: what NaN and infinity in an input are.
    """
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(json.dumps(plain(facts), sort_keys=True).encode() + b"\n")

    # Kernels give the same bits everywhere, but not methods that need whole tensors.
    add([version_of(package) for package in ("meldkit", "numpy", "numba", "torch")])
    add(plan.method, plan.seed, plan.settings, device, non_finite)
    for identity in beside:
        add(*side_facts(identity))
    for identity in inputs:
        is_weights = identity.path.suffix == ".safetensors"
        header = header_sha256(identity.path) if is_weights else None
        add(str(identity.path.resolve()), identity.num_bytes, identity.mtime_ns, header)
    for shard in layout.shards:
        digest.update(shard.header)
    group_of, groups = parameter_groups(layout.places)
    add(groups)
    lines = (
        f"{group} {_readers(place.tensor)}\n" for place, group in zip(layout.places, group_of, strict=True)
    )
    digest.update("".join(lines).encode())
    return digest.hexdigest()


@functools.cache
def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _readers(tensor: OutputTensor) -> list[str]:
    return [f"{reader.where}:{reader.dtype}" for reader in tensor_readers(tensor)]


class ProgressFile:
    """The record of one staging folder.

    Args:
        folder: staged.
        digest: of the merge.
        sync: makes everything durable that has been written to the weights files.
        seconds: between two records; a sync that takes long makes them rarer.
    """

    def __init__(self, folder: Path, digest: str, sync: Callable[[], None], *, seconds: float) -> None:
        self._path = folder / PROGRESS_NAME
        self._digest = digest
        self._sync = sync
        self._seconds = seconds
        self._descriptor: int | None = None
        self._waiting: list[tuple[int, int]] = []
        self._findings = Findings()
        self._due = time.monotonic() + seconds
        self._lock = threading.Lock()  # of what is waiting
        self._writing = threading.Lock()

    def read(self) -> tuple[list[tuple[int, int]], Findings] | None:
        """Ranges of finished places and what was found in them; None where there is no record of this merge."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        ranges, findings, seen_digest = [], Findings(), False
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                break
            if not seen_digest:
                if record != {"digest": self._digest}:
                    return None
                seen_digest = True
                continue
            ranges += [(first, last) for first, last in record["places"]]
            findings.add(Findings(**record["findings"]))
        return (ranges, findings) if seen_digest else None

    def open(self) -> None:
        """Begin, or go on after the last complete line."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)
        if not whole:
            self._write({"digest": self._digest})

    def finished(self, first: int, last: int, findings: Findings) -> None:
        """Places ``first`` to ``last - 1`` are written. Recorded when a record is due and no thread is at it."""
        with self._lock:
            self._waiting.append((first, last))
            self._findings.add(findings)
        if time.monotonic() >= self._due and self._writing.acquire(blocking=False):
            try:
                self._record()
            finally:
                self._writing.release()

    def _record(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            findings, self._findings = self._findings, Findings()
        if not waiting:
            return
        started = time.monotonic()
        self._sync()
        self._write({"places": waiting, "findings": dataclasses.asdict(findings)})
        now = time.monotonic()
        self._due = now + max(self._seconds, (now - started) / MAX_SYNC_SHARE if self._seconds else 0.0)

    def _write(self, record: dict[str, Any]) -> None:
        assert self._descriptor is not None
        os.write(self._descriptor, json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def flush(self) -> None:
        """Record everything that is finished, for a merge that is interrupted."""
        with self._writing:
            self._record()

    def save(self) -> bool:
        """After a failure: record what can be recorded. Whether there is anything to go on with."""
        with contextlib.suppress(OSError, MergeError):  # of the disk that has just failed
            self.flush()
        known = self.read()
        return known is not None and bool(known[0])

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)
