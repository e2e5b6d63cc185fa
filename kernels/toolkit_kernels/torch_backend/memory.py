"""Spans as torch tensors, and the scratch memory of each thread.

Legend: R rows, C elements of a chunk.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit_kernels.rules import BLOCK, Inputs
from toolkit_kernels.spans import Span

# Elements of a chunk at most: half of the number from which torch uses threads of its own, or a device's worth.
CPU_CHUNK = 1 << 14
DEVICE_CHUNK = 1 << 21
# Float64 rows of scratch at most, so that they stay in a core's cache of 1 MiB beside what is read.
CPU_SCRATCH_BYTES = 1 << 19
# Views of the scratch that a thread remembers: making one takes as long as an addition of a chunk.
MAX_VIEWS = 64

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def tensor_of(span: Span) -> Tensor:
    """The memory of a span as a tensor; it lives as long as the span does."""
    if isinstance(span.data, Tensor):
        return span.data
    tensor = torch.from_numpy(span.data if span.data.flags.writeable else np.asarray(_Writable(span.data)))
    return tensor.view(torch.bfloat16) if span.dtype == "bfloat16" else tensor


class _Writable:
    """A read-only array under the flag that torch wants to see: it warns of arrays that cannot be written, and the
    kernels write none of their inputs."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tensors of ``Inputs`` for C elements in a row.

    Attributes:
        theta: K tensors [C].
        base: [C] or None.
        fisher: K tensors [C] or none.
        start: index, in the whole tensor, of the first element.
        offset: index of the first element within the inputs.
    """

    theta: tuple[Tensor, ...]
    base: Tensor | None
    fisher: tuple[Tensor, ...]
    start: int
    offset: int

    @property
    def size(self) -> int:
        return len(self.theta[0])

    @property
    def device(self) -> torch.device:
        return self.theta[0].device


def chunk_size(num_rows: int, device: torch.device) -> int:
    """Elements of a chunk for which R = ``num_rows`` rows of float64 are needed: a power of two, at least BLOCK."""
    if device.type != "cpu":
        return DEVICE_CHUNK
    fitting = CPU_SCRATCH_BYTES // (8 * num_rows)
    return max(BLOCK, min(CPU_CHUNK, 1 << max(fitting, 1).bit_length() - 1))


def chunks_of(inputs: Inputs, num_rows: int) -> Iterator[Chunk]:
    """The inputs in chunks, in order."""
    theta = [tensor_of(span) for span in inputs.theta]
    size = chunk_size(num_rows, theta[0].device)
    theta = [tensor.split(size) for tensor in theta]
    fisher = [tensor_of(span).split(size) for span in inputs.fisher]
    base = None if inputs.base is None else tensor_of(inputs.base).split(size)
    for number in range(len(theta[0]) if inputs.size else 0):
        yield Chunk(
            tuple(parts[number] for parts in theta),
            None if base is None else base[number],
            tuple(parts[number] for parts in fisher),
            inputs.start + number * size,
            number * size,
        )


class Scratch(threading.local):
    """Memory of the thread that asks, kept from call to call: one buffer for each dtype and device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._rows: dict[tuple[int, int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def rows(
        self, num_rows: int, size: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        """R tensors [C] with anything in them. The next request for the same dtype takes the same memory."""
        key = num_rows, size, dtype, device
        rows = self._rows.get(key)
        if rows is None:
            rows = self.matrix(num_rows, size, device, dtype).unbind()
            if len(self._rows) >= MAX_VIEWS:
                self._rows.clear()
            self._rows[key] = rows
        return rows

    def matrix(
        self, num_rows: int, size: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """One tensor [R, C] with anything in it, in the same memory."""
        buffer = self._buffers.get((dtype, device))
        if buffer is None or len(buffer) < num_rows * size:
            buffer = self._buffers[dtype, device] = torch.empty(num_rows * size, dtype=dtype, device=device)
            self._rows.clear()  # views would keep the smaller buffer alive
        return buffer[: num_rows * size].view(num_rows, size)


scratch = Scratch()
