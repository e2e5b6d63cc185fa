"""What a kernel is asked to do: the inputs of one piece of a tensor, and the rule by which they become the output.

Every backend (reference, torch, numba, triton) takes these and nothing else. All arithmetic is that of float64 in the
order written here, from k = 0 upwards, without fused multiply-add; the result is rounded to float32 and from there to
the output's dtype, each to nearest even (float64 outputs are not rounded). So backends agree bit for bit.

Legend: K models, N elements, theta_k model k, theta_0 the base, delta_k = theta_k - theta_0 in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit_kernels.spans import Span

Floats = NDArray[np.float64]

# The length of the blocks over which sums of products are formed; see Backend.gram.
BLOCK = 1024
# Sums of weights whose magnitude is this small beside that of the weights are rounding.
CANCELLED = 1e-12


@dataclass(frozen=True, slots=True)
class Inputs:
    """The same N elements of one tensor in every model.

    Attributes:
        theta: K spans of N elements each; dtypes may differ.
        base: theta_0, or None.
        fisher: K spans of N non-negative elements, or none.
        start: index, in the whole tensor, of the first of these N elements. A multiple of BLOCK.
    """

    theta: tuple[Span, ...]
    base: Span | None = None
    fisher: tuple[Span, ...] = ()
    start: int = 0

    @property
    def size(self) -> int:
        return self.theta[0].size


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """out = base_weight * theta_0 + sum_k weights_k * theta_k, the base first.

    ``base_weight`` is None where there is no base to add.
    """

    weights: Floats
    base_weight: float | None = None


@dataclass(frozen=True, slots=True)
class FisherMean:
    """out = sum_k w_k f_k theta_k / sum_k w_k f_k with f_k = max(F_k, floor_k).

    The product w_k * f_k is formed first. Where the denominator is zero: sum_k fallback_k * theta_k.
    Source: Matena & Raffel 2022, arXiv:2111.09832, eq. 4.

    Attributes:
        weights: [K], the models' weights, divided by whatever normalises F_k.
        floors: [K], in the units of F_k; 0 for none.
        fallback: [K], the plain weights; they add up to 1.
    """

    weights: Floats
    floors: Floats
    fallback: Floats


@dataclass(frozen=True, slots=True)
class Threshold:
    """A set of largest elements: those whose magnitude has a bit pattern above ``bits``, and of the equal ones those up
    to index ``last`` in the whole tensor.

    The magnitude of an element is |delta_k| rounded to float32; its bit pattern, as an unsigned integer, has the same
    order.
    """

    bits: int
    last: int


NOTHING = Threshold(0xFFFFFFFF, -1)


@dataclass(frozen=True, slots=True)
class Keep:
    """Which elements of delta_k stay; the others become zero. The default keeps all.

    Attributes:
        among: only elements in this set of largest (TIES' trimming).
        outside: no element of this set of largest (breadcrumbs' outliers).
        probability: keep at random with this probability (DARE, arXiv:2311.03099): element i of the tensor stays if its
            32 random bits are below floor(probability * 2**32). The bits are word i % 4 of Philox4x32-10
            (Salmon et al. 2011) with the counter (i // 4 low, i // 4 high, stream, 0) and the key ``key``.
        key: two words of 32 bits, from seed and tensor name.
        stream: tells the models of one merge apart.
        rescale: factor of what stays, 1 / probability in DARE.
    """

    among: Threshold | None = None
    outside: Threshold | None = None
    probability: float | None = None
    key: tuple[int, int] = (0, 0)
    stream: int = 0
    rescale: float = 1.0


@dataclass(frozen=True, slots=True)
class Consensus:
    """out = theta_0 + scale * m, where m combines v_k = weights_k * (rescale_k * delta_k), zero where not kept.

    Without ``elect``: m = sum_k v_k; with ``normalize`` divided by sum_k weights_k.
    With ``elect`` (TIES, arXiv:2306.01708): s = +1 if sum_k v_k >= 0 else -1; m = sum of the v_k with sign(v_k) = s;
    with ``normalize`` divided by the sum of the weights of those k.
    A sum that is NaN elects -1. A divisor of at most ``negligible`` in magnitude counts as one: weights of both signs
    that cancel leave rounding. Sums start at +0.0 and add +0.0 for what is left out.
    """

    weights: Floats
    keep: tuple[Keep, ...]
    elect: bool
    normalize: bool
    scale: float

    @property
    def negligible(self) -> float:
        """CANCELLED * sum_k |weights_k|, over all models."""
        return CANCELLED * math.fsum(abs(self.weights))


@dataclass(frozen=True, slots=True)
class NearSwap:
    """out = theta_0 + w * (theta_1 - theta_0) with w = min(1, t / |theta_1 - theta_0|), and 1 where they are equal.

    theta_0 is the base of the inputs, theta_1 their only model.
    """

    t: float


Rule = WeightedSum | FisherMean | Consensus | NearSwap


@dataclass(frozen=True, slots=True)
class Piece:
    """One launch's worth: apply ``rule`` to ``inputs`` and write ``out`` (N elements, no overlap with inputs except
    that it may be exactly one of them: an element is read before it is written)."""

    inputs: Inputs
    rule: Rule
    out: Span


Pieces = Sequence[Piece]
