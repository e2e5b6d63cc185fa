"""The mean of LoRA products B A, as factors near the mean factors.

Averaging A and B apart is not averaging the products. The nearest product of the same rank is known (Eckart & Young
1936), but not the factors it is written in: B G and G^-1 A are the same product for every invertible G. Optimizers,
though, keep moments of each factor's elements. So of all pairs with that product one is taken whose A is near the mean
of the A_k; where the factors' mean happens to be exact, it is what comes out.

Legend: K contributions of rank r; B_k [out, r], A_k [r, in]; q <= r is the rank of the merged product.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolkit.merging.lora.adapter import EMBEDDING_PARTS, LINEAR_PARTS
from toolkit.merging.lora.rank_space import Factors, Stack, truncated
from toolkit_kernels.rules import Floats

# Singular values below this share of the largest are rounding of the factors, not directions that were learned.
NEGLIGIBLE = 1e-12
# No direction of the merged A is shorter than this share of the usual length, else B would have to be huge there.
SHORTEST = 0.1


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of the two factors of one module."""

    module: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class ProductError:
    """How far a module's merged product is from the weighted mean of the products.

    Attributes:
        error: ||B A - sum_k w_k B_k A_k||_F.
        norm: ||sum_k w_k B_k A_k||_F.
    """

    error: float
    norm: float

    @property
    def relative(self) -> float:
        """error / norm; 0 where the mean is zero."""
        return self.error / self.norm if self.norm else 0.0


def factor_pairs(names: Iterable[str]) -> list[Pair]:
    """The pairs of factors among the tensors of an adapter, in their order."""
    present = list(names)
    known = set(present)
    pairs = []
    for name in present:
        for parts in (LINEAR_PARTS, EMBEDDING_PARTS):
            module = name.removesuffix(parts["a"])
            if module != name and module + parts["b"] in known:
                pairs.append(Pair(module, name, module + parts["b"]))
    return pairs


def mean_is_exact(states: Sequence[Mapping[str, torch.Tensor]], pair: Pair) -> bool:
    """Whether one factor is the same everywhere, so that the mean of the other gives the mean of the products."""
    first = states[0]
    return any(
        all(torch.equal(first[name], state[name]) for state in states[1:]) for name in (pair.a, pair.b)
    )


def mean_product(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], pair: Pair
) -> tuple[dict[str, torch.Tensor], ProductError]:
    """Factors of the best rank-r approximation of sum_k w_k B_k A_k, in the dtypes of the first state.

    Args:
        states: K states with both factors; a convolution's are flattened.
        weights: w_k, of sum 1.
        pair: the names.
    """
    stack = _stack(states, weights, pair)
    rank = stack.ranks[0]
    length = np.sqrt(np.average([_square(a) for a in np.split(stack.a, len(states))], weights=weights) / rank)
    mean_a = np.tensordot(np.asarray(weights, np.float64), stack.a.reshape(len(states), rank, -1), axes=1)
    product = truncated(stack, rank)
    b, a = near_mean(product, mean_a, SHORTEST * float(length))
    merged = {pair.a: _like(a, states[0][pair.a]), pair.b: _like(b, states[0][pair.b])}
    return merged, ProductError(product.error, product.norm)


def near_mean(product: Factors, mean_a: Floats, shortest: float) -> tuple[Floats, Floats]:
    """B [out, r] and A [r, in] with B A = ``product``, A near ``mean_a``.

    With the product U S V' and mean_a = L Q, Q of orthonormal rows: the rows of Q are turned, by the smallest rotation
    (orthogonal Procrustes), until they span those of V', which gives R; A = L R, and B = U S V' R' L^-1. Rows that the
    product does not need stay as they are, all of them where it is zero.

    Args:
        product: U sqrt(S) and sqrt(S) V'.
        mean_a: [r, in].
        shortest: smallest singular value of A.
    """
    values = np.sum(product.b**2, axis=0)
    keep = values > NEGLIGIBLE * max(values, default=0.0)
    root = np.sqrt(values[keep])
    u, v = product.b[:, keep] / root, (product.a[keep] / root[:, None]).T
    x, lengths, q = np.linalg.svd(mean_a, full_matrices=False)
    lengths = np.maximum(lengths, shortest)
    left, _, right = np.linalg.svd(q @ v, full_matrices=False)
    turn = left @ right  # [rows of Q, columns of V]
    a = (x * lengths) @ (turn @ v.T + q - left @ (left.T @ q))
    b = (u * values[keep]) @ turn.T @ (x / lengths).T
    return b, a


def product_error(
    merged: Mapping[str, torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
    pair: Pair,
) -> ProductError:
    """What averaging the factors apart, or another method on them, does to the product of a module."""
    difference = _stack([*states, merged], [*weights, -1.0], pair)
    return ProductError(difference.norm(), _stack(states, weights, pair).norm())


def summary(errors: Mapping[str, ProductError]) -> dict[str, Any]:
    """For a record: relative error over all modules, and the module where it is largest."""
    norm = math.hypot(*(entry.norm for entry in errors.values()))
    error = math.hypot(*(entry.error for entry in errors.values()))
    worst = max(errors, key=lambda module: errors[module].relative)
    return {
        "relative_error": error / norm if norm else 0.0,
        "largest_in": worst,
        "largest": errors[worst].relative,
    }


def _stack(states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], pair: Pair) -> Stack:
    a = [_matrix(state[pair.a]).reshape(state[pair.a].shape[0], -1) for state in states]
    b = [_matrix(state[pair.b]).reshape(state[pair.b].shape[0], -1) for state in states]
    ranks = tuple(len(entry) for entry in a)
    return Stack(
        np.concatenate(b, axis=1), np.concatenate(a), np.repeat(np.asarray(weights, np.float64), ranks), ranks
    )


def _matrix(tensor: torch.Tensor) -> Floats:
    return tensor.detach().to("cpu", torch.float64).numpy()


def _like(values: Floats, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).reshape(tensor.shape).to(tensor.device, tensor.dtype)


def _square(values: Floats) -> float:
    return float(np.sum(values**2))
