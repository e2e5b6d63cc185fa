"""Memory that kernels read and write: typed, flat, contiguous, on any device, from numpy or torch.

numpy has no bfloat16, so a bfloat16 array of numpy is one of uint16 with the bit patterns. This module imports no
torch: merging files on a CPU needs none.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Code of a dtype in tables that compiled kernels read, its bytes an element, and the numpy type that carries it.
CODES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CARRIERS = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}


@dataclass(frozen=True, slots=True)
class Span:
    """N floating-point numbers in a row.

    Attributes:
        data: numpy array or torch tensor, one-dimensional and contiguous; keeps the memory alive.
        dtype: float16, bfloat16, float32 or float64.
    """

    data: Any
    dtype: str

    @classmethod
    def of(cls, values: Any) -> "Span":
        """A span over a contiguous torch tensor of any shape, or a numpy array (not bfloat16: see ``dtype``).

        Raises:
            TypeError: not a floating-point type that kernels know.
            ValueError: not contiguous.
        """
        if isinstance(values, np.ndarray):
            dtype, flat = str(values.dtype), values.reshape(-1)
            contiguous = values.flags.c_contiguous
        else:
            values = values.detach()
            dtype, contiguous = str(values.dtype).removeprefix("torch."), values.is_contiguous()
            flat = values.view(-1) if contiguous else values
        if dtype not in CODES:
            raise TypeError(f"kernels know {', '.join(CODES)}, not {dtype}")
        if not contiguous:
            raise ValueError("kernels take contiguous memory")
        return cls(flat, dtype)

    @property
    def size(self) -> int:
        return int(self.data.shape[0])

    @property
    def num_bytes(self) -> int:
        return self.size * ITEMSIZES[self.dtype]

    @property
    def code(self) -> int:
        return CODES[self.dtype]

    @property
    def address(self) -> int:
        return self.data.ctypes.data if isinstance(self.data, np.ndarray) else self.data.data_ptr()

    @property
    def device(self) -> str:
        """``cpu``, ``cuda:0``, ..."""
        return "cpu" if isinstance(self.data, np.ndarray) else str(self.data.device)

    @property
    def on_cpu(self) -> bool:
        """``device == "cpu"``, faster."""
        return isinstance(self.data, np.ndarray) or self.data.is_cpu

    def part(self, start: int, size: int) -> "Span":
        """The ``size`` elements from ``start`` on; a view."""
        return Span(self.data[start : start + size], self.dtype)
