"""SHA-256 of every input file, on threads of its own beside the merge: no core waits while a file is to be hashed."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from toolkit.merging.streaming.digest_memory import DigestMemory, is_same
from toolkit.merging.streaming.safetensors_file import FileIdentity

# Read and hashed at a time: the second finds in the cache what the first has read.
BLOCK_BYTES = 1 << 18
# Between two looks for a signal while only hashing is left.
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 of a file, and whether it was remembered from an earlier merge rather than computed now."""

    sha256: str
    is_remembered: bool


class InputDigests:
    """Digests of files; a context manager that ends its threads.

    Args:
        files: to hash, none where no digests are wanted.
        num_threads: of the merge. Hashing has as many; with one, it begins when the merge is done.
        memory: of earlier digests, or None.
        recall: whether a digest may come from there. What is computed goes there in any case.
    """

    def __init__(
        self, files: Sequence[FileIdentity], num_threads: int, memory: DigestMemory | None, *, recall: bool
    ) -> None:
        self._files = sorted(files, key=lambda identity: -identity.num_bytes)
        self._memory, self._recalls = memory, recall
        self._executor = ThreadPoolExecutor(num_threads)
        self._futures: dict[Path, Future[Digest]] = {}
        self._is_over = False
        self._began = self._ended = 0.0
        self._begins_at_once = num_threads > 1

    def __enter__(self) -> "InputDigests":
        if self._begins_at_once:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._executor.shutdown(cancel_futures=True)

    def results(self, check: Callable[[], None]) -> dict[Path, Digest]:
        """All digests, waited for.

        Args:
            check: called now and then; raises to end the work.

        Raises:
            OSError: a file cannot be read.
        """
        if not self._begins_at_once:
            self._begin()
        waiting = set(self._futures.values())
        while waiting:
            check()
            done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # an error need not wait for the others
        return {path: future.result() for path, future in self._futures.items()}

    @property
    def seconds(self) -> float:
        """From the beginning to the last digest that is there."""
        return self._ended - self._began

    def _begin(self) -> None:
        self._began = self._ended = time.perf_counter()
        for path in (identity.path for identity in self._files):
            self._futures[path] = self._executor.submit(self._digest, path)

    def _digest(self, path: Path) -> Digest:
        try:
            with open(path, "rb", buffering=0) as stream:
                digest = self._digest_of(stream.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a failed read names no file
        self._ended = time.perf_counter()
        return digest

    def _digest_of(self, descriptor: int) -> Digest:
        status, memory = os.fstat(descriptor), self._memory
        if memory is not None and self._recalls and (known := memory.known(status)) is not None:
            return Digest(known, is_remembered=True)
        began = memory.now() if memory is not None else 0
        sha256 = self._computed(descriptor)
        if memory is not None and is_same(status, os.fstat(descriptor)):
            memory.remember(status, sha256, began)
        return Digest(sha256, is_remembered=False)

    def _computed(self, descriptor: int) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
        while num_read := os.readv(descriptor, [block]):
            if self._is_over:
                raise CancelledError  # nobody waits for it; a digest of half a file must not be remembered
            digest.update(block[:num_read])
        return digest.hexdigest()
