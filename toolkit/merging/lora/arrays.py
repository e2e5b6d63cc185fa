"""Tensors of adapters as numpy arrays, bfloat16 among them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ModelError
from toolkit.merging.group import MemoryReader
from toolkit_kernels import dispatch
from toolkit_kernels.rules import Floats, Inputs, Piece, WeightedSum
from toolkit_kernels.spans import CARRIERS, CODES, Span

if TYPE_CHECKING:
    import torch


def widened(values: NDArray[Any], dtype: str) -> Floats:
    """float64 copies of numbers of type ``dtype``; numpy carries bfloat16 as its bit patterns in uint16."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """A floating-point tensor.

    Attributes:
        values: of any shape; uint16 bit patterns where the type is bfloat16.
        dtype: float16, bfloat16, float32 or float64.
    """

    values: NDArray[Any]
    dtype: str

    @classmethod
    def of(cls, tensor: Any) -> "Array":
        """A view of (or, from a GPU, a copy of) a tensor of torch; an Array or an array of numpy as it is.

        Raises:
            TypeError: not floating-point.
        """
        if isinstance(tensor, Array):
            return tensor
        if isinstance(tensor, np.ndarray):
            values, dtype = tensor, str(tensor.dtype)
        else:
            tensor = tensor.detach().cpu()
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype == "bfloat16":
                import torch

                tensor = tensor.view(torch.uint16)
            values = tensor.numpy()
        if dtype not in CODES:
            raise TypeError(f"not a floating-point type: {dtype}")
        return cls(values, dtype)

    @classmethod
    def rounded(cls, values: Floats, dtype: str) -> "Array":
        """``values`` rounded to ``dtype`` by the merge kernels: to float32, and from there, each to nearest even."""
        return weighted_sum([cls(np.ascontiguousarray(values), "float64")], np.ones(1), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def transposed(self) -> "Array":
        return Array(self.values.T, self.dtype)

    def float64(self) -> Floats:
        return widened(self.values, self.dtype)

    def rows(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop`` in float64."""
        return widened(self.values[start:stop], self.dtype)

    def span(self) -> Span:
        return Span(np.ascontiguousarray(self.values).reshape(-1), self.dtype)

    def reader(self, where: str) -> MemoryReader:
        return MemoryReader(self.span(), self.shape, self.dtype, where)

    def num_non_finite(self) -> int:
        if self.dtype == "bfloat16":
            return int(np.count_nonzero((self.values & 0x7F80) == 0x7F80))
        return int(np.count_nonzero(~np.isfinite(self.values)))

    def equals(self, other: "Array") -> bool:
        """Whether types, shapes and values agree."""
        return self.dtype == other.dtype and np.array_equal(self.values, other.values)

    def to_torch(self) -> "torch.Tensor":
        """A copy as a tensor of torch."""
        import torch

        return torch.from_numpy(self.values.copy()).view(getattr(torch, self.dtype))


def weighted_sum(arrays: list[Array], weights: Floats, dtype: str) -> Array:
    """sum_k weights_k arrays_k by the merge kernels: in float64, from k = 0 upwards, rounded once to ``dtype``."""
    out = np.empty(arrays[0].shape, CARRIERS[dtype])
    if out.size:
        inputs = Inputs(tuple(array.span() for array in arrays))
        piece = Piece(inputs, WeightedSum(np.asarray(weights, np.float64)), Span(out.reshape(-1), dtype))
        dispatch.backend("auto").apply([piece])
    return Array(out, dtype)


def widest(arrays: list[Array]) -> str:
    """The narrowest type that holds the numbers of all of them."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"


def arrays_of(state: Mapping[str, Any], where: str) -> dict[str, Array]:
    """The tensors of a state as arrays.

    Raises:
        ModelError: one is not floating-point.
    """
    arrays = {}
    for name, tensor in state.items():
        try:
            arrays[name] = Array.of(tensor)
        except TypeError as error:
            raise ModelError(f"{where}: {name} is {error}; adapters hold floating-point tensors") from error
    return arrays
