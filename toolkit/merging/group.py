"""One tensor of the result with the same tensor of every model: what a merge method is given.

Readers hide where elements come from (memory, a file, a file with an adapter added, chosen rows), so that a method is
written once. Passes over a group go piece by piece; nothing here loads a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from toolkit_kernels import sums
from toolkit_kernels.backend import Backend
from toolkit_kernels.philox import key_of
from toolkit_kernels.rules import BLOCK, Floats, Inputs, Threshold
from toolkit_kernels.spans import ITEMSIZES, Span

if TYPE_CHECKING:
    import torch

# Elements of one piece, a multiple of BLOCK and a power of two: so many that calls cost little beside the work, so few
# that inputs and output of a few models stay in the caches. 128 and 256 blocks were slower, and so were 64.
PIECE_SIZE = 512 * BLOCK
# Below this many bytes a call of the system costs more than touching mapped pages.
MIN_READ_BYTES = 1 << 16
ALIGNMENT = 64
# Pieces of a large tensor whose elements are counted: at most this many.
NUM_COUNTED = 16


class Reader(Protocol):
    """One tensor of one model. Safe to use from several threads."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Torch's name: bfloat16, float32, int64, ..."""
        ...

    @property
    def where(self) -> str:
        """File or model, for messages."""
        ...

    def span(self, start: int, size: int) -> Span:
        """Elements ``start`` to ``start + size`` of the flattened tensor; a view where that is possible."""
        ...


def stored_dtype(reader: Reader) -> str:
    """The type in which a model holds a tensor: the base's, where a reader adds an adapter to it in float32."""
    return getattr(reader, "result_dtype", reader.dtype)


@dataclass(frozen=True, slots=True)
class MemoryReader:
    """A contiguous tensor of torch (or array of numpy) in memory."""

    whole: Span
    shape: tuple[int, ...]
    dtype: str
    where: str

    @classmethod
    def of(cls, tensor: "torch.Tensor", where: str) -> "MemoryReader":
        whole = Span.of(tensor.contiguous())
        return cls(whole, tuple(tensor.shape), whole.dtype, where)

    def span(self, start: int, size: int) -> Span:
        return self.whole.part(start, size)


@dataclass(frozen=True, slots=True)
class FisherTensor:
    """The diagonal Fisher of one tensor of one model.

    Attributes:
        reader: non-negative elements, of the tensor's shape.
        mean: mean of this tensor's elements.
        norm: L2 norm of this tensor's elements.
        model_norm: L2 norm over all tensors of the model.
    """

    reader: Reader
    mean: float
    norm: float
    model_norm: float


class Scratch:
    """Memory of one thread for elements of files, used again for every piece."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._used = 0

    def begin(self, num_bytes: int) -> None:
        """Everything taken so far is free again; ``num_bytes`` can be taken."""
        self._used = 0
        if len(self._bytes) < num_bytes:
            self._bytes = np.empty(num_bytes, np.uint8)

    def span(self, reader: Reader, start: int, size: int) -> Span:
        """Elements of a reader, copied here where it reads from a file and they are many; else as it gives them."""
        read = getattr(reader, "read", None)
        num_bytes = size * ITEMSIZES.get(reader.dtype, 0)
        if read is None or num_bytes < MIN_READ_BYTES or self._used + num_bytes > len(self._bytes):
            return reader.span(start, size)
        memory = self._bytes[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return read(start, size, memory)


@dataclass(frozen=True)
class TensorGroup:
    """The tensor ``name`` of K models, and of the base where there is one.

    Attributes:
        name: in the result.
        shape: of all of them.
        models: K readers.
        base: theta_0.
        fisher: K entries, or none; None for a model whose Fisher does not cover this tensor.
        seed: of random masks.
        backend: does the passes.
        parallel_map: how passes over several pieces run.
        device: where whole tensors are computed, for methods that need them.
        passes: what has gone over the elements so far; the pages of their files are mapped then.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[Reader, ...]
    base: Reader | None
    backend: Backend
    fisher: tuple[FisherTensor | None, ...] = ()
    seed: int = 0
    parallel_map: sums.Map = map
    device: str = "cpu"
    passes: list[str] = field(default_factory=list, compare=False)

    @property
    def num_models(self) -> int:
        return len(self.models)

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def key(self) -> tuple[int, int]:
        """The random key of this tensor, from seed and name."""
        return key_of(self.seed, self.name)

    def pieces(self, *, base: bool, fisher: bool = False, size: int = PIECE_SIZE) -> list[Inputs]:
        """The group as inputs of kernels, in order. ``base`` and ``fisher`` say what a piece carries."""
        return [self.piece(start, base=base, fisher=fisher, size=size) for start in range(0, self.size, size)]

    def piece(
        self,
        start: int,
        *,
        base: bool,
        fisher: bool = False,
        size: int = PIECE_SIZE,
        scratch: Scratch | None = None,
    ) -> Inputs:
        """The ``size`` elements from ``start`` on, or as many as there are; in ``scratch`` until it begins anew."""
        size = min(size, self.size - start)
        if fisher and any(entry is None for entry in self.fisher):
            raise ValueError(f"{self.name}: a model has no Fisher for this tensor")
        readers = [*self.models, *([self.base] if base and self.base is not None else [])]
        fishers = [entry.reader for entry in self.fisher if entry] if fisher else []
        if scratch is None:
            spans = [reader.span(start, size) for reader in (*readers, *fishers)]
        else:
            needed = sum(size * ITEMSIZES.get(reader.dtype, 0) + ALIGNMENT for reader in (*readers, *fishers))
            scratch.begin(needed)
            spans = [scratch.span(reader, start, size) for reader in (*readers, *fishers)]
        num_models = len(self.models)
        return Inputs(
            tuple(spans[:num_models]),
            spans[num_models] if len(readers) > num_models else None,
            tuple(spans[len(readers) :]),
            start,
        )

    def gram(self, *, deltas: bool) -> Floats:
        """[K, K] float64 products <theta_i, theta_j>, or <delta_i, delta_j>, over the whole tensor."""
        if not self.size:
            return np.zeros((self.num_models, self.num_models))
        self.passes.append("gram")
        return sums.gram(self.backend, self.pieces(base=deltas), self.parallel_map)

    def largest(self, counts: Sequence[int]) -> list[Threshold]:
        """For each model the set of its ``counts[k]`` elements of largest |delta_k|."""
        self.passes.append("largest")
        # A histogram takes half a megabyte a model: few and large pieces.
        size = max(-(-self.size // (NUM_COUNTED * BLOCK)) * BLOCK, NUM_COUNTED * PIECE_SIZE)
        return sums.largest(self.backend, self.pieces(base=True, size=size), counts, self.parallel_map)

    def tensors(self, dtype: str = "float32") -> "tuple[list[torch.Tensor], torch.Tensor | None]":
        """All models and the base as whole tensors on ``device``, for methods that need matrices or rows."""
        import torch

        def whole(reader: Reader) -> torch.Tensor:
            span = reader.span(0, self.size)
            values = span.data
            if isinstance(values, np.ndarray):
                values = torch.from_numpy(values).view(getattr(torch, span.dtype))
            return values.to(device=self.device, dtype=getattr(torch, dtype)).reshape(self.shape)

        return [whole(reader) for reader in self.models], None if self.base is None else whole(self.base)
