"""Interpolation on a sphere. Angles and lengths come from one Gram matrix, so each method is a weighted sum."""

from math import acos, fsum, pi, sin
from typing import TYPE_CHECKING

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.weights import EQUAL_WEIGHT, WEIGHT, around_base, have_a_mean, shares
from toolkit.merging.registry import REQUIRED, Parameter, merge_method
from toolkit_kernels.rules import Floats, WeightedSum

if TYPE_CHECKING:
    import torch

# slerp: from this cosine on the arc is a line as far as anyone can see.
STRAIGHT = 0.9995
# nuslerp: below this square of the sine, two vectors span no plane; a Gram matrix in float64 knows it to about 1e-15.
NO_PLANE = 1e-12


def lengths(gram: Floats) -> Floats:
    """The norm of each vector of a Gram matrix."""
    return np.sqrt(np.maximum(np.diagonal(gram), 0.0))


def arc(t: float, cosine: float) -> Floats:
    """Weights of two vectors at the fraction t of the arc between them: sin((1 - t) a) / sin(a), sin(t a) / sin(a)."""
    angle = acos(min(max(cosine, -1.0), 1.0))
    return np.array([sin((1 - t) * angle), sin(t * angle)]) / sin(angle)


@merge_method(
    "slerp",
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    parameters=[Parameter("t", float, REQUIRED)],
    base="required",
    base_is_a_model=True,
    num_models=(1, 1),
)
def slerp(group: TensorGroup, t: float) -> WeightedSum:
    """Spherical interpolation from the base model (t = 0) to another one (t = 1).

    [sin((1 - t) a) theta_0 + sin(t a) theta_1] / sin(a), with a the angle between the two flattened tensors; a line
    where they are parallel or opposite (|cos a| > 0.9995) or one of them is zero.
    """
    gram = group.gram(deltas=False)
    product = float(lengths(gram).prod())
    if product == 0 or abs(gram[0, 1]) > STRAIGHT * product:
        return WeightedSum(np.array([1 - t, t]))
    return WeightedSum(arc(t, gram[0, 1] / product))


@merge_method(
    "nuslerp",
    paper="mergekit",
    parameters=[WEIGHT, Parameter("nuslerp_row_wise", bool, False), Parameter("nuslerp_flatten", bool, True)],
    base="optional",
    num_models=(2, 2),
)
def nuslerp(
    group: TensorGroup, weight: Floats, nuslerp_row_wise: bool, nuslerp_flatten: bool
) -> "WeightedSum | torch.Tensor":
    """Spherical interpolation of two models, or of their deltas around a base.

    slerp with t = w_1 / (w_0 + w_1), 1/2 where the weights add up to zero. Without ``nuslerp_flatten`` each vector of
    the last dimension is interpolated by itself, with ``nuslerp_row_wise`` each one of the first dimension.
    """
    total = fsum(weight)
    t = 0.5 if abs(total) < 1e-6 else float(weight[1]) / total
    if not nuslerp_flatten and group.size:
        from toolkit.merging.methods.rows import slerp_by_vectors

        return slerp_by_vectors(group, t, along_first=nuslerp_row_wise, no_plane=NO_PLANE)
    gram = group.gram(deltas=group.base is not None)
    product = float(lengths(gram).prod())
    cosine = gram[0, 1] / product if product else 1.0
    if 1 - cosine**2 <= NO_PLANE:
        return around_base(group, np.array([1 - t, t]))
    return around_base(group, arc(t, cosine))


@merge_method(
    "multislerp",
    paper="Goddard 2025, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=[WEIGHT, Parameter("normalize_weights", bool, True), Parameter("eps", float, 1e-8)],
    check=have_a_mean("normalize_weights"),
    base="optional",
)
def multislerp(group: TensorGroup, weight: Floats, normalize_weights: bool, eps: float) -> WeightedSum:
    """Weighted mean of directions, at the weighted mean of lengths.

    sum_k w_k |theta_k| * m / |m| with m = sum_k w_k theta_k / (|theta_k| + eps), of deltas where there is a base. (The
    published step through the tangent space at m / |m| adds nothing: the weighted projections sum_k w_k (u_k - <u_k, m>
    m / |m|^2) cancel for any weights.) A weighted sum of the tensors where |m| < eps.
    """
    if group.num_models == 1:
        return WeightedSum(np.ones(1))
    weights = shares(group, weight) if normalize_weights else np.asarray(weight, np.float64)
    gram = group.gram(deltas=group.base is not None)
    norms = lengths(gram)
    direction = (
        weights / (norms + eps)
        if eps
        else np.divide(weights, norms, where=norms > 0, out=np.zeros_like(norms))
    )
    length = float(np.sqrt(max(direction @ gram @ direction, 0.0)))
    if length < eps or length == 0:
        return around_base(group, weights)
    return around_base(group, direction * (fsum(weights * norms) / length))


@merge_method(
    "karcher",
    paper="Karcher mean of models, arXiv:2603.04972",
    parameters=[EQUAL_WEIGHT, Parameter("max_iter", int, 10), Parameter("tol", float, 1e-5)],
    check=have_a_mean(),
)
def karcher(group: TensorGroup, weight: Floats, max_iter: int, tol: float) -> WeightedSum:
    """The direction with the least mean squared angle to all models, at the weighted mean of lengths.

    Repeats m <- exp_m(sum_k a_k log_m(u_k)) with u_k = theta_k / |theta_k|, a_k = w_k / sum_k w_k and log_m(u) =
    angle / sin(angle) (u - <u, m> m) until the step is shorter than ``tol``. m stays a combination sum_k c_k u_k, so
    only its K coefficients are iterated, with the K x K products of the u_k. Tensors of zeros have no direction.
    """
    alpha = shares(group, weight)
    gram = group.gram(deltas=False)
    norms = lengths(gram)
    there = norms > 0
    if not there.any():
        return WeightedSum(alpha)
    cosines = gram[np.ix_(there, there)] / np.outer(norms[there], norms[there])
    coefficients = np.zeros_like(norms)
    coefficients[there] = karcher_mean(cosines, alpha[there], max_iter, tol) / norms[there]
    return WeightedSum(coefficients * fsum(alpha * norms))


def karcher_mean(cosines: Floats, alpha: Floats, max_iter: int, tol: float) -> Floats:
    """Coefficients [K] of the Karcher mean of K unit vectors.

    Args:
        cosines: [K, K] their products.
        alpha: [K] their weights.
        max_iter: most steps.
        tol: shortest step, and the angle below which two directions are the same, or opposite.
    """

    def length(coefficients: Floats) -> float:
        return float(np.sqrt(max(coefficients @ cosines @ coefficients, 0.0)))

    alpha = alpha / fsum(alpha) if fsum(alpha) else np.full_like(alpha, 1 / len(alpha))
    mean = alpha
    if length(mean) < tol:  # they balance out: start from one of them
        mean = np.eye(len(alpha))[0]
    mean = mean / length(mean)
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        apart = (angles >= tol) & (pi - angles >= tol)
        pull = alpha * np.divide(angles, np.sin(angles), where=apart, out=np.zeros_like(angles))
        step = pull - (pull @ dots) * mean
        size = length(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + (np.sin(size) / size) * step
        mean = mean / length(mean)
    return mean
