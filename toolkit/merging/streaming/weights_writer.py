"""The weights files of a merge while they are written: full size and headers first, then elements at known places."""

import errno
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import MergeError
from toolkit.merging.streaming.layout import Layout

_CANNOT_PREALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes that were handed to the kernel: number of the file, place in it, and their CRC-32."""

    shard: int
    start: int
    num_bytes: int
    checksum: int


class WeightsWriter:
    """Open weights files. Writes may come from several threads.

    Args:
        folder: staged.
        layout: of the result.
        keeps_checksums: of all that is written from now on.

    Raises:
        MergeError: the disk is full or fails.
    """

    def __init__(self, folder: Path, layout: Layout, *, keeps_checksums: bool = False) -> None:
        self._keeps_checksums = keeps_checksums
        self._written: list[Written] = []
        self.paths = [folder / shard.name for shard in layout.shards]
        self._layout = layout
        self._descriptors: list[int] = []

    def create(self) -> None:
        """Make the files. Blocks are allocated now: two threads then write ten times as fast, and a full disk shows."""
        for path, shard in zip(self.paths, self._layout.shards, strict=True):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                self._descriptors.append(descriptor)
                try:
                    os.posix_fallocate(descriptor, 0, shard.num_bytes)
                except OSError as error:
                    if error.errno not in _CANNOT_PREALLOCATE:
                        raise
                    os.ftruncate(descriptor, shard.num_bytes)
            except OSError as error:
                raise _failed(path, error) from error
            self.write(len(self._descriptors) - 1, 0, memoryview(shard.header))

    def reopen(self) -> bool:
        """Go on with the files of a killed merge; False where they are not those of this layout."""
        for path, shard in zip(self.paths, self._layout.shards, strict=True):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                break
            self._descriptors.append(descriptor)
            if os.fstat(descriptor).st_size != shard.num_bytes:
                break
            if os.pread(descriptor, len(shard.header), 0) != shard.header:
                break
        else:
            return True
        self.close()
        return False

    def write(self, shard: int, start: int, memory: memoryview) -> None:
        """Write bytes at byte ``start`` of a file."""
        if self._keeps_checksums:
            self._written.append(Written(shard, start, memory.nbytes, zlib.crc32(memory)))
        try:
            while memory.nbytes:
                written = os.pwrite(self._descriptors[shard], memory, start)
                memory, start = memory[written:], start + written
        except OSError as error:
            raise _failed(self.paths[shard], error) from error

    @property
    def written(self) -> Sequence[Written]:
        """Tensors' bytes that this process wrote, where checksums are kept."""
        headers = [len(shard.header) for shard in self._layout.shards]
        return [unit for unit in self._written if unit.start >= headers[unit.shard]]

    def sync(self) -> None:
        """Make everything written so far durable."""
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise _failed(path, error) from error

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _failed(path: Path, error: OSError) -> MergeError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space, or choose a folder on another disk" if is_full else None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "allow more open files (ulimit -n 65536), or larger shards"
    return MergeError(f"{path} cannot be written: {error.strerror}", hint=hint)
