"""Methods on singular values and vectors of deltas: TSV-M and ISO-C, for matrices; other tensors are averaged.

No singular value decomposition is formed: the eigenvectors of the product on the smaller side (n x n for a matrix of
m x n, m >= n) give all that is needed, in float64. Directions whose singular value is rounding are left out, so that
deltas of low rank (adapters) gain no arbitrary directions.
"""

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.weights import EQUAL_WEIGHT, LAMBDA, around_base, have_a_mean, shares
from toolkit.merging.registry import merge_method
from toolkit_kernels.rules import Floats, WeightedSum

if TYPE_CHECKING:
    import torch


@merge_method(
    "tsv_m",
    paper="Gargiulo et al. 2025, Task singular vectors, arXiv:2412.00081",
    parameters=[EQUAL_WEIGHT, LAMBDA],
    base="required",
    check=have_a_mean(),
)
def tsv_m(group: TensorGroup, weight: Floats, lambda_: float) -> "WeightedSum | torch.Tensor":
    """The base plus the deltas' leading singular vectors, made orthogonal between models.

    w_k delta_k = U_k S_k V_k^T cut to the first r / K triplets (r the smaller side); U = [U_1 ... U_K], V and S
    likewise; theta_0 + lambda U_o S V_o^T with U_o = U (U^T U)^(-1/2), the nearest matrix of orthogonal columns, and
    V_o likewise. A tensor that is no matrix: theta_0 + lambda sum_k w_k delta_k / sum_k w_k.
    """
    if len(group.shape) != 2 or not group.size:
        return _averaged(group, weight, lambda_)
    import torch

    deltas, base = _deltas_and_base(group)
    count = max(min(group.shape) // len(deltas), 1)
    triplets = [leading_triplets(float(w) * delta, count) for w, delta in zip(weight, deltas, strict=True)]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    return base + lambda_ * (orthogonal(u) * s) @ orthogonal(v).mT


@merge_method(
    "iso_c",
    paper="Marczak et al. 2025, No task left behind, arXiv:2502.04959",
    parameters=[EQUAL_WEIGHT, LAMBDA],
    base="required",
    check=have_a_mean(),
)
def iso_c(group: TensorGroup, weight: Floats, lambda_: float) -> "WeightedSum | torch.Tensor":
    """The base plus the sum of deltas with all its singular values made equal.

    sum_k w_k delta_k = U S V^T; theta_0 + lambda mean(S) U V^T, over the singular values that are not zero. A tensor
    that is no matrix: theta_0 + lambda sum_k w_k delta_k / sum_k w_k.
    """
    if len(group.shape) != 2 or not group.size:
        return _averaged(group, weight, lambda_)
    deltas, base = _deltas_and_base(group)
    total = base.new_zeros(group.shape)
    for w, delta in zip(weight, deltas, strict=True):
        total += float(w) * delta
    tall = total if group.shape[0] >= group.shape[1] else total.mT
    values, vectors = singular_values(tall)
    if not len(values):
        return base
    even = values.mean() * tall @ ((vectors / values) @ vectors.mT)
    return base + lambda_ * (even if tall is total else even.mT)


def singular_values(tall: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """[r] singular values above rounding, largest first, and [n, r] right vectors, of an [m, n] matrix, m >= n."""
    import torch

    squares, vectors = torch.linalg.eigh(tall.mT @ tall)
    values = squares.clamp(min=0).sqrt().flip(0)
    sound = values > sqrt(len(values) * torch.finfo(values.dtype).eps) * values[0]
    return values[sound], vectors.flip(1)[:, sound]


def leading_triplets(matrix: "torch.Tensor", count: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """[m, c] left vectors, [c] singular values, [n, c] right vectors; c = ``count``, or the rank if that is smaller."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = leading_triplets(matrix.mT, count)
        return u, s, v
    values, vectors = singular_values(matrix)
    values, vectors = values[:count], vectors[:, :count]
    return matrix @ vectors / values, values, vectors


def orthogonal(columns: "torch.Tensor") -> "torch.Tensor":
    """X (X^T X)^(-1/2): the nearest matrix of orthonormal columns (orthogonal Procrustes).

    Of columns that depend on each other, the nearest partial isometry.
    """
    if not columns.shape[1]:
        return columns
    values, vectors = singular_values(columns)
    return columns @ ((vectors / values) @ vectors.mT)


def _averaged(group: TensorGroup, weight: Floats, lambda_: float) -> WeightedSum:
    return around_base(group, lambda_ * shares(group, np.asarray(weight)))


def _deltas_and_base(group: TensorGroup) -> "tuple[list[torch.Tensor], torch.Tensor]":
    models, base = group.tensors("float64")
    assert base is not None  # the methods require one
    return [model - base for model in models], base
