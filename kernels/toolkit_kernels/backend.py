"""The contract that every backend fulfils, and the choice among those that can run here."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels.rules import Floats, Inputs, Pieces
from toolkit_kernels.spans import Span


class Backend(Protocol):
    """Calls may come from several threads at once, each with its own pieces."""

    name: str

    def apply(self, pieces: Pieces) -> NDArray[np.int64]:
        """Compute each piece's output and return, for each piece, how many elements of it are NaN or infinite."""
        ...

    def gram(self, inputs: Inputs) -> Floats:
        """[K, K] sums of products <theta_i, theta_j>, or <delta_i, delta_j> where there is a base, in float64.

        The sum is a fixed binary tree, so that it does not depend on threads, pieces or backends: the products of
        a block of BLOCK elements (the last one filled up with zeros) are added by halves, x[: n / 2] + x[n / 2 :]
        down to one; blocks are then added as neighbours, (0 + 1), (2 + 3), ..., again and again, filled up with
        zeros to a power of two.
        """
        ...

    def histogram(self, inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
        """Count the magnitudes |delta_k| (|theta_k| without a base), rounded to float32, by their bit patterns.

        Returns:
            [K, 32768] counts by the upper 15 bits below the sign (bits >> 16), where ``prefixes`` is None; else
            [K, 65536] counts by the lower 16 bits of those elements of model k whose upper bits are ``prefixes[k]``.
        """
        ...

    def sift(
        self, inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint32]]]:
        """Compare the bit patterns of the magnitudes, as histogram() forms them, with a lower and an upper bound.

        Args:
            inputs: K models.
            bounds: (low, high) for each model, 0 <= low < high < 2**31.
            room: how many patterns are given back at most for a model.

        Returns:
            [K, 4] how many are above high, at least high, above low, at least low; and for each model the patterns
            between the bounds, without them, in any order: all, or ``room`` of them.
        """
        ...

    def nth_equal(self, inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
        """Find the ``number``-th element (from 1) of delta_k whose magnitude has exactly these bits.

        Returns:
            how many there are, counted up to ``number``, and the index of that one within ``inputs``; -1 for none.
        """
        ...

    def non_finite(self, inputs: Inputs) -> NDArray[np.int64]:
        """[K] how many elements of each theta_k are NaN or infinite; with a base [K + 1], the base last."""
        ...

    def add_squares(self, total: Span, values: Span, scale: float = 1.0) -> None:
        """total += scale * values * values in place; ``total`` is float32, computed in float64 and rounded once."""
        ...


Maker = Callable[[], Backend]
