"""--verify: the files as the disk gives them back are those that were computed, and another backend computes the same.

All bytes are compared with checksums of what was handed to the kernel; a sample of tensors is computed once more.
"""

import hashlib
import os
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from toolkit.errors import MergeError
from toolkit.merging.plan import MergePlan
from toolkit.merging.streaming.compute import Computer, Findings, as_bytes, is_copied, piece_bounds, typed
from toolkit.merging.streaming.layout import Layout, Place
from toolkit.merging.streaming.report import Verified
from toolkit.merging.streaming.safetensors_file import CARRIER, WeightsFile
from toolkit.merging.streaming.weights_writer import Written
from toolkit_kernels import dispatch
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import Inputs
from toolkit_kernels.spans import CODES, Span

# Every tensor of at most this many elements is computed again, up to a number of them; of the others a sample.
SMALL_SIZE = 1 << 16
MAX_SMALL_TENSORS = 1000
NUM_LARGE_TENSORS = 4
# Bytes that are read at a time.
BLOCK_BYTES = 1 << 20
# Of a large tensor this many pieces, the last one among them.
NUM_PIECES = 4


def verify(
    folder: Path,
    layout: Layout,
    plan: MergePlan,
    units: Sequence[Written],
    computer: Computer,
    pool: Pool,
    check: Callable[[], None],
) -> Verified:
    """Compare files with what was to be written.

    Args:
        folder: with the weights files.
        layout: of them.
        plan: they were computed from.
        units: what this process wrote, with checksums.
        computer: that computed them.
        pool: of threads.
        check: called now and then; raises to end the work.

    Returns:
        What was compared. The sample is drawn with the seed of the plan.

    Raises:
        MergeError: a file differs from what was to be written; the message names file and tensor.
    """
    paths = [folder / shard.name for shard in layout.shards]
    sha256 = dict(zip([path.name for path in paths], pool.map(_digest_from_disk, paths), strict=True))
    for path, shard in zip(paths, layout.shards, strict=True):
        if _head(path, len(shard.header)) != shard.header or path.stat().st_size != shard.num_bytes:
            raise MergeError(f"{path} has not the header or the size that was written")
    written = _Files([WeightsFile(path) for path in paths])
    if not computer.keeps:
        pool.map(lambda place: written.refuse_non_finite(place, computer, check), layout.places)
    second = _second_backend(computer)
    sample = _sample(layout.places, plan.seed)
    compared = pool.map(lambda place: written.compare(place, second, plan.seed, check), sample)
    # Last, as a unit may be many tensors and the sample names one.
    pool.map(lambda unit: _compare_checksum(paths[unit.shard], unit, layout, check), units)
    return Verified(
        len(sample),
        sum(size for size, _ in compared),
        second.backend.name,
        sum(different for _, different in compared),
        sum(unit.num_bytes for unit in units),
        sha256,
    )


def _head(path: Path, num_bytes: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(num_bytes)


def _digest_from_disk(path: Path) -> str:
    """SHA-256 after the kernel has been asked to forget the file's pages; they have been synced before."""
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _second_backend(computer: Computer) -> Computer:
    name = "torch" if computer.backend.name == "reference" else "reference"
    return computer.with_backend(dispatch.backend(name, "cpu"))


def _sample(places: Sequence[Place], seed: int) -> list[Place]:
    generator = random.Random(seed)
    filled = [place for place in places if place.num_bytes]
    small = [place for place in filled if place.tensor.size <= SMALL_SIZE]
    large = [place for place in filled if place.tensor.size > SMALL_SIZE]
    small = generator.sample(small, min(len(small), MAX_SMALL_TENSORS))
    return sorted(
        small + generator.sample(large, min(len(large), NUM_LARGE_TENSORS)), key=lambda place: place.index
    )


def _compare_checksum(path: Path, unit: Written, layout: Layout, check: Callable[[], None]) -> None:
    check()
    checksum, start, end = 0, unit.start, unit.start + unit.num_bytes
    with open(path, "rb") as stream:
        stream.seek(start)
        while start < end:
            block = stream.read(min(end - start, BLOCK_BYTES))
            if not block:
                break
            checksum, start = zlib.crc32(block, checksum), start + len(block)
    if checksum != unit.checksum or start != end:
        names = [
            place.tensor.name
            for place in layout.places
            if place.shard == unit.shard and place.start < end and unit.start < place.start + place.num_bytes
        ]
        what = names[0] if len(names) == 1 else f"one of {len(names)} tensors, {names[0]} to {names[-1]},"
        raise MergeError(f"{path}: {what} differs from what was written")


class _Files:
    """The tensors of the result as they lie in the files."""

    def __init__(self, files: Sequence[WeightsFile]) -> None:
        self._files = files

    def refuse_non_finite(self, place: Place, computer: Computer, check: Callable[[], None]) -> None:
        reader = self._files[place.shard].reader(place.tensor.name)
        if reader.dtype not in CODES:
            return
        for start, size in piece_bounds(place.tensor.size):
            check()
            if int(computer.backend.non_finite(Inputs((reader.span(start, size),)))[0]):
                raise MergeError(
                    f"{place.tensor.name} in {reader.where} holds NaN or infinity, which was not written"
                )

    def compare(
        self, place: Place, second: Computer, seed: int, check: Callable[[], None]
    ) -> tuple[int, int]:
        """(elements computed again, elements with other bits)."""
        tensor = place.tensor
        reader = self._files[place.shard].reader(tensor.name)
        bounds = list(piece_bounds(tensor.size))
        if len(bounds) > NUM_PIECES:
            generator = random.Random(f"{seed}:{tensor.name}")
            bounds = [*sorted(generator.sample(bounds[:-1], NUM_PIECES - 1)), bounds[-1]]
        findings = Findings()
        prepared = None if is_copied(tensor) else second.prepare(tensor, findings)
        num_different = 0
        for start, size in bounds:
            check()
            if prepared is None:
                again = second.copy(tensor, start, size, findings)
            else:
                out = typed(np.empty(size * CARRIER[tensor.dtype].itemsize, np.uint8), tensor.dtype)
                second.compute([(prepared, start, out)], findings)
                again = as_bytes(out)
            span = reader.span(start, size)
            if as_bytes(span) == again:
                continue
            distance = _ulps(span, Span(np.frombuffer(again, span.data.dtype), span.dtype))
            if prepared is None or distance.max() > 1:
                element = start + int(distance.argmax())
                raise MergeError(
                    f"{tensor.name} in {reader.where}: element {element:,} is not what {second.backend.name} computes"
                )
            num_different += int(np.count_nonzero(distance))
        return sum(size for _, size in bounds), num_different


def _ulps(first: Span, second: Span) -> np.ndarray:
    """Distance of two spans in units of the last place, by the order of their bit patterns."""

    def ordered(span: Span) -> np.ndarray:
        signed = np.frombuffer(as_bytes(span), np.dtype(f"i{span.data.dtype.itemsize}"))
        smallest = np.iinfo(signed.dtype).min
        return np.where(signed < 0, smallest - signed, signed).astype(np.float64)

    return np.abs(ordered(first) - ordered(second))
