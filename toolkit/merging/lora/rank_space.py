"""Sums of low-rank products without their products: all work is in the factors and in matrices of their rank.

Legend: K adapters of ranks r_k, n = sum_k r_k; B_k [out, r_k], A_k [r_k, in]; c_k = w_k s_k, weight times scale; the
exact sum is Delta = sum_k c_k B_k A_k = B C A with B [out, n] and A [n, in] stacked and C = diag(c_k) [n, n].
All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.merging.lora.adapter import LoraModule
from toolkit.merging.lora.arrays import Array
from toolkit_kernels.rules import Floats


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The factors of one module in all adapters that have it.

    Attributes:
        b: [out, n].
        a: [n, in].
        weights: [n], c_k of each column of B.
        ranks: K of them.
    """

    b: Floats
    a: Floats
    weights: Floats
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[LoraModule], weights: Sequence[float]) -> "Stack":
        ranks = tuple(module.rank for module in modules)
        scaled = [weight * module.scale for module, weight in zip(modules, weights, strict=True)]
        b = np.concatenate([module.b.float64() for module in modules], axis=1)
        a = np.concatenate([module.a.float64() for module in modules])
        return cls(b, a, np.repeat(scaled, ranks), ranks)

    def norm(self, middle: Floats | None = None) -> float:
        """||B M A||_F with M [n, n], C by default.

        From the Gram matrices of the factors: trace(M' B'B M AA').
        """
        middle = np.diag(self.weights) if middle is None else middle
        square = np.sum((self.b.T @ self.b @ middle) * (middle @ (self.a @ self.a.T)))
        return float(np.sqrt(max(square, 0.0)))


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A product B A that stands for Delta.

    Attributes:
        b: [out, r].
        a: [r, in].
        error: ||B A - Delta||_F, from the method, not from rounding.
        norm: ||Delta||_F.
    """

    b: Floats
    a: Floats
    error: float
    norm: float


def concatenated(stack: Stack) -> Factors:
    """Delta itself, of rank n: weights and scales go into B, A stays as it is."""
    return Factors(stack.b * stack.weights, stack.a, 0.0, stack.norm())


def truncated(stack: Stack, rank: int) -> Factors:
    """The nearest product of rank ``rank`` (Eckart & Young 1936).

    B = Q_B R_B and A' = Q_A R_A; R_B C R_A' = U S V' is [n, n], so that Delta = (Q_B U) S (Q_A V)'. The singular values
    that are left out are the error. Each factor takes the square root of those that stay.
    """
    q_b, r_b = np.linalg.qr(stack.b)
    q_a, r_a = np.linalg.qr(stack.a.T)
    u, values, vt = np.linalg.svd((r_b * stack.weights) @ r_a.T)
    rank = min(rank, len(values))
    root = np.sqrt(values[:rank])
    return Factors(
        q_b @ (u[:, :rank] * root),
        (root[:, None] * vt[:rank]) @ q_a.T,
        float(np.linalg.norm(values[rank:])),
        float(np.linalg.norm(values)),
    )


def averaged(stack: Stack, weights: Sequence[float], scale: float) -> Factors:
    """scale B A with the means of the factors: B = sum_k c_k B_k / scale, A = sum_k w_k A_k / sum_k w_k.

    Not Delta: products of factors of different adapters come in, at the cost of those of the same.

    Args:
        stack: all of one rank r.
        weights: w_k; their sum is not zero.
        scale: of the result.
    """
    rank = stack.ranks[0]
    shares = np.repeat(np.asarray(weights, np.float64) / sum(weights), rank)
    spread = np.tile(
        np.eye(rank), (len(stack.ranks), 1)
    )  # [n, r]: every adapter's column i goes into column i
    left, right = stack.weights[:, None] * spread, shares[:, None] * spread
    error = stack.norm(left @ right.T - np.diag(stack.weights))
    return Factors(stack.b @ (left / scale), right.T @ stack.a, error, stack.norm())


def rounding_error(factors: Factors, b: Array, a: Array) -> float:
    """||B~ A~ - B A||_F of the stored factors: (B~ - B) A~ + B (A~ - A), whose terms lose nothing to cancellation."""
    stored_a = a.float64()
    in_b, in_a = b.float64() - factors.b, stored_a - factors.a
    pairs = [(in_b, stored_a)] if in_b.any() else []
    if in_a.any():
        pairs.append((factors.b, in_a))
    if not pairs:
        return 0.0
    left = np.concatenate([pair[0] for pair in pairs], axis=1)
    right = np.concatenate([pair[1] for pair in pairs])
    return float(np.sqrt(max(np.sum((left.T @ left) * (right @ right.T)), 0.0)))
