"""SHA-256 of files that have not changed since they were hashed: large inputs are read for it once.

    DEVICE INODE BYTES MTIME_NS CTIME_NS SHA256 CHECK

One line a file, all in one file of the cache folder; of two lines for the same file the later one counts. CHECK is the
beginning of the line's own SHA-256: a line that is damaged, or was cut off by a kill, is no line. Lines are appended by
one write each, so several processes may add to it at the same time. Nothing here is an error: without this memory files
are hashed again.

A file is known by what its system says of it, as in git's index. Its ctime cannot be set, so a file that was written
since has another one, whatever was done to its mtime; except within one tick of the clock. Therefore nothing is
remembered of a file that had been changed shortly before it was hashed.
"""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

# A clock ticks every few milliseconds, that of a server may be wrong by seconds, and a page that one process keeps
# writing through a mapping shows in the times only when the kernel has cleaned it, after half a minute.
SETTLED_NS = 60 * 10**9
# Some five thousand files. Beyond it the older half is forgotten.
MAX_BYTES = 1 << 20
NUM_CHECK_DIGITS = 16


class DigestMemory:
    """What is known of files. Several threads may use it.

    Args:
        path: of the file with the lines; neither it nor its folder need exist.
        clock: nanoseconds since 1970, as files' times.
    """

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock = clock

    def known(self, status: os.stat_result) -> str | None:
        """The SHA-256 of the file with this status, if it is remembered."""
        return self._digests.get(_key(status))

    def remember(self, status: os.stat_result, sha256: str, began_ns: int) -> None:
        """Keep the SHA-256 of a file.

        Args:
            status: of the file, the same before and after it was hashed.
            sha256: hexadecimal.
            began_ns: when hashing began, by this memory's clock.
        """
        if began_ns - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
            return
        text = f"{_key(status)} {sha256}"
        with contextlib.suppress(OSError):
            self._append(f"{text} {_check(text)}\n".encode())

    def now(self) -> int:
        return self._clock()

    @cached_property
    def _digests(self) -> dict[str, str]:
        digests = {}
        for line in self._content().decode("ascii", errors="replace").splitlines():
            text, _, check = line.rpartition(" ")
            if text and check == _check(text):
                key, _, sha256 = text.rpartition(" ")
                digests[key] = sha256
        return digests

    def _content(self) -> bytes:
        try:
            with open(self._path, "rb") as stream:
                return stream.read(2 * MAX_BYTES)
        except OSError:
            return b""

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
            is_full = os.fstat(descriptor).st_size > MAX_BYTES
        finally:
            os.close(descriptor)
        if is_full:
            self._forget_older_half()

    def _forget_older_half(self) -> None:
        """What another process adds meanwhile is lost, and hashed again."""
        content = self._content()
        beside = self._path.with_name(f"{self._path.name}-{uuid.uuid4().hex[:8]}")
        try:
            beside.write_bytes(content[content.find(b"\n", len(content) // 2) + 1 :])
            os.replace(beside, self._path)
        finally:
            beside.unlink(missing_ok=True)


def is_same(first: os.stat_result, second: os.stat_result) -> bool:
    """Whether nothing has happened to a file between the two."""
    return _key(first) == _key(second)


def _key(status: os.stat_result) -> str:
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_dev} {status.st_ino} {status.st_size} {times}"


def _check(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:NUM_CHECK_DIGITS]
