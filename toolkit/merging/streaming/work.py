"""The work of a merge on threads: runs of small tensors, pieces of large ones, computed and written in place."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toolkit.merging.group import Scratch
from toolkit.merging.streaming.compute import (
    Computer,
    Findings,
    Prepared,
    effective_weights,
    is_copied,
    piece_bounds,
    rule_name,
    typed,
)
from toolkit.merging.streaming.layout import Place
from toolkit.merging.streaming.progress_file import ProgressFile
from toolkit.merging.streaming.safetensors_file import CARRIER
from toolkit.merging.streaming.weights_writer import WeightsWriter
from toolkit_kernels.pool import Pool

# Neighbouring tensors are computed together and written with one call, up to this many bytes and tensors.
RUN_BYTES = 1 << 20
RUN_TENSORS = 256
# Below this many bytes a tensor it is the interpreter that works, and two threads would only take turns at its lock.
TINY_BYTES = 1 << 14


class Work:
    """Computes places of a layout and writes them.

    Args:
        computer: of elements.
        writer: of the files.
        progress: is told what is finished.
        group_of: of each place, the group of tensors whose weights are noted together.
        stop: called between pieces; raises to end the work.
        on_progress: called, from any thread, with the bytes of the result that are written so far.
    """

    def __init__(
        self,
        computer: Computer,
        writer: WeightsWriter,
        progress: ProgressFile,
        group_of: Sequence[str],
        stop: Callable[[], None],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.findings = Findings()
        self._computer, self._writer, self._progress = computer, writer, progress
        self._group_of, self._stop, self._on_progress = group_of, stop, on_progress
        self._bytes_done = 0
        self._memory = threading.local()
        self._lock = threading.Lock()

    def do(self, places: Sequence[Place], todo: Sequence[Place], pool: Pool) -> None:
        """Those of all places that are still to be done, on all threads of the pool."""
        self._bytes_done = sum(place.num_bytes for place in places) - sum(place.num_bytes for place in todo)
        wide, runs = shares(todo, pool.num_threads)
        for place in wide:
            self._large(place, pool.map)
        tiny = [run for run in runs if sum(place.num_bytes for place in run) < TINY_BYTES * len(run)]
        others = [run for run in runs if sum(place.num_bytes for place in run) >= TINY_BYTES * len(run)]
        pool.map(self._runs, [tiny, *([run] for run in others)])

    def _runs(self, runs: Sequence[Sequence[Place]]) -> None:
        for run in runs:
            self._run(run)

    def _run(self, run: Sequence[Place]) -> None:
        if len(run) == 1 and run[0].num_bytes > RUN_BYTES:
            self._large(run[0], map)
            return
        self._stop()
        findings = Findings()
        first = run[0].start
        memory = self._buffer(run[-1].start + run[-1].num_bytes - first)
        parts: list[tuple[Prepared, int, Any]] = []
        for place in run:
            if not place.num_bytes:
                continue
            tensor, start = place.tensor, place.start - first
            part = memory[start : start + place.num_bytes]
            if is_copied(tensor):
                part[:] = self._computer.copy(tensor, 0, tensor.size, findings)
            else:
                prepared = self._prepared(place, findings, map)
                out = typed(part, tensor.dtype)
                parts += [
                    (prepared, start, out.part(start, size)) for start, size in piece_bounds(tensor.size)
                ]
        if parts:
            self._computer.compute(parts, findings)
        self._writer.write(run[0].shard, first, memory.data)
        self._finished(run[0].index, run[-1].index + 1, len(memory), findings)

    def _large(self, place: Place, parallel_map: Any) -> None:
        """A tensor of several pieces, one after the other or, if it is wide, side by side."""
        self._stop()
        tensor, findings = place.tensor, Findings()
        prepared = None if is_copied(tensor) else self._prepared(place, findings, parallel_map)
        itemsize = CARRIER[tensor.dtype].itemsize

        def piece(bounds: tuple[int, int]) -> Findings:
            self._stop()
            start, size = bounds
            seen = Findings()
            if prepared is None:
                content = self._computer.copy(tensor, start, size, seen)
            else:
                memory = self._buffer(size * itemsize)
                parts = [(prepared, start, typed(memory, tensor.dtype))]
                self._computer.compute(parts, seen, self._scratch())
                content = memory.data
            self._writer.write(place.shard, place.start + start * itemsize, content)
            return seen

        for seen in parallel_map(piece, list(piece_bounds(tensor.size))):
            findings.add(seen)
        self._finished(place.index, place.index + 1, place.num_bytes, findings)

    def _prepared(self, place: Place, findings: Findings, parallel_map: Any) -> Prepared:
        prepared = self._computer.prepare(place.tensor, findings, parallel_map)
        weights = effective_weights(prepared)
        findings.see(self._group_of[place.index], rule_name(prepared), weights, weights)
        return prepared

    def _buffer(self, num_bytes: int) -> np.ndarray:
        """Memory of this thread, used again and again."""
        memory = getattr(self._memory, "bytes", None)
        if memory is None or len(memory) < num_bytes:
            memory = self._memory.bytes = np.empty(max(num_bytes, RUN_BYTES), np.uint8)
        return memory[:num_bytes]

    def _scratch(self) -> Scratch:
        """Of this thread."""
        scratch = getattr(self._memory, "scratch", None)
        if scratch is None:
            scratch = self._memory.scratch = Scratch()
        return scratch

    def _finished(self, first: int, last: int, num_bytes: int, findings: Findings) -> None:
        self._progress.finished(first, last, findings)
        with self._lock:
            self.findings.add(findings)
            self._bytes_done += num_bytes
            if self._on_progress is not None:
                self._on_progress(self._bytes_done)


def shares(places: Sequence[Place], num_threads: int) -> tuple[list[Place], list[list[Place]]]:
    """Tensors that all threads share, and runs of neighbours that one thread takes, the largest first.

    A tensor that alone would keep the other threads waiting at the end is shared.
    """
    total = sum(place.num_bytes for place in places)
    wide: list[Place] = []
    runs: list[list[Place]] = []
    run: list[Place] = []
    num_bytes = 0
    for place in places:
        if num_threads > 1 and place.num_bytes > max(total // (4 * num_threads), RUN_BYTES):
            wide.append(place)
            continue
        is_next = bool(run) and run[-1].index + 1 == place.index and run[-1].shard == place.shard
        if is_next and num_bytes + place.num_bytes <= RUN_BYTES and len(run) < RUN_TENSORS:
            run.append(place)
            num_bytes += place.num_bytes
        else:
            run = [place]
            num_bytes = place.num_bytes
            runs.append(run)
    runs.sort(key=lambda run: -sum(place.num_bytes for place in run))
    return wide, runs
