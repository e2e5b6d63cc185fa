"""RegMean: the weights that reproduce each model's outputs on its own inputs best, in closed form."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ConfigError
from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.weights import EQUAL_WEIGHT, have_a_mean, importances, shares
from toolkit.merging.registry import REQUIRED, Parameter, merge_method
from toolkit_kernels.rules import Floats, WeightedSum

if TYPE_CHECKING:
    import torch

# A matrix with ones on its diagonal whose eigenvalues go below this has lost what float32 sums knew of it.
SINGULAR = 1e-7


@merge_method(
    "regmean",
    paper="Jin et al. 2023, Dataless knowledge fusion, arXiv:2212.09849",
    parameters=[
        EQUAL_WEIGHT,
        Parameter("gram", Path, REQUIRED, per_model=True),
        Parameter("alpha", float, 0.9, bounds=(0.0, 1.0)),
    ],
    check=have_a_mean(),
)
def regmean(
    group: TensorGroup, weight: Floats, gram: Sequence[Any], alpha: float
) -> "WeightedSum | torch.Tensor":
    """Linear layers merged so that the models' outputs on their own inputs change least; other tensors averaged.

    theta = (sum_k w_k theta_k H_k) (sum_k w_k H_k)^-1 with H_k = alpha G_k + (1 - alpha) diag(G_k) and G_k [in, in] the
    mean of x x^T over the layer's inputs in model k: the least squares solution of theta x = theta_k x, with
    correlations scaled by alpha. Inputs that no model has seen get the plain weighted mean.

    Args:
        group: one tensor.
        weight: w_k.
        gram: for each model its file of Gram matrices, or :class:`toolkit.merging.methods.grams.Grams`.
        alpha: 1 for the exact solution, 0 for the diagonal alone.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError([f"alpha is {alpha:g}; it must lie between 0 and 1"])
    weights = importances(group, weight)
    plain = shares(group, weights)
    if len(group.shape) != 2 or not group.size:
        return WeightedSum(plain)
    from toolkit.merging.methods import grams

    found = [grams.gram(source, group.name, group.shape[1], group.device) for source in gram]
    products = [matrix for matrix in found if matrix is not None]
    if len(products) < group.num_models:
        return WeightedSum(plain)
    thetas, _ = group.tensors("float64")
    # As a correction of the mean, so that models that agree stay as they are and unseen directions get the mean.
    mean = thetas[0].new_zeros(group.shape)
    for w, theta in zip(plain, thetas, strict=True):
        mean += w * theta
    total, pulled = products[0].new_zeros(products[0].shape), mean.new_zeros(group.shape)
    for w, theta, product in zip(plain, thetas, products, strict=True):
        softened = alpha * product
        softened.diagonal().copy_(product.diagonal())
        total += w * softened
        pulled += (w * (theta - mean)) @ softened
    return mean + solved(pulled, total)


def solved(right: "torch.Tensor", matrix: "torch.Tensor") -> "torch.Tensor":
    """X of least norm with X ``matrix`` = ``right``; ``matrix`` [n, n] is positive semi-definite, ``right`` [m, n].

    Scaled to a diagonal of ones first: inputs of very different sizes stay apart from rounding.
    """
    import torch

    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    scaled = scale[:, None] * matrix * scale
    scaled.diagonal().fill_(1.0)  # an input that was never seen: no equation, no correction
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed and factor.diagonal().min() ** 2 > SINGULAR:
        return torch.cholesky_solve((right * scale).mT, factor).mT * scale
    values, vectors = torch.linalg.eigh(scaled)
    sound = values > SINGULAR * values[-1]
    kept = vectors[:, sound]
    return ((right * scale) @ kept / values[sound]) @ kept.mT * scale
