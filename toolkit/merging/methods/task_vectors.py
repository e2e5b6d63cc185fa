"""Arithmetic on deltas: task_arithmetic, TIES, DARE, breadcrumbs."""

from math import fsum

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.weights import LAMBDA, WEIGHT, around_base, fractions
from toolkit.merging.registry import Parameter, merge_method
from toolkit_kernels.rules import NOTHING, Consensus, Floats, Keep, WeightedSum

DENSITY = Parameter("density", float, 1.0, per_model=True, bounds=(0.0, 1.0))
GAMMA = Parameter("gamma", float, 0.01, per_model=True, bounds=(0.0, 1.0))
RESCALE = Parameter("rescale", bool, True)


def normalize(default: bool) -> Parameter:
    return Parameter("normalize", bool, default)


def divisor(weights: Floats) -> float:
    """sum_k w_k; one where that is zero."""
    total = fsum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def consensus(
    group: TensorGroup, keep: list[Keep], weight: Floats, elect: bool, normalize: bool, scale: float
) -> Consensus:
    """The kernel's rule; a sum that elects nothing is divided here, once for all elements."""
    if normalize and not elect:
        return Consensus(weight, tuple(keep), False, False, scale / divisor(weight))
    return Consensus(weight, tuple(keep), elect, normalize, scale)


@merge_method(
    "task_arithmetic",
    paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    parameters=[WEIGHT, normalize(False), LAMBDA],
    base="required",
)
def task_arithmetic(group: TensorGroup, weight: Floats, normalize: bool, lambda_: float) -> WeightedSum:
    """The base plus weighted deltas.

    theta_0 + lambda sum_k w_k delta_k; with ``normalize`` divided by sum_k w_k.
    """
    return around_base(
        group, np.asarray(weight, np.float64) * (lambda_ / (divisor(weight) if normalize else 1.0))
    )


@merge_method(
    "ties",
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    parameters=[WEIGHT, DENSITY, normalize(True), LAMBDA],
    base="required",
)
def ties(group: TensorGroup, weight: Floats, density: Floats, normalize: bool, lambda_: float) -> Consensus:
    """The largest elements of each delta, where they agree with the sign of the weighted sum.

    trim: v_k = w_k delta_k for the share ``density`` of largest |delta_k| of the tensor (at least one), else 0;
    elect: s = sign(sum_k v_k), + for 0; merge: theta_0 + lambda (sum of the v_k of sign s) / (sum of their weights),
    without ``normalize`` not divided.
    """
    return consensus(group, trimmed(group, density), weight, True, normalize, lambda_)


def trimmed(group: TensorGroup, density: Floats) -> list[Keep]:
    """For each model the share ``density`` of its largest elements, at least one of them."""
    density = fractions(group, "density", density)
    if not group.size or min(density) == 1:
        return [Keep() for _ in density]
    counts = [max(1, int(share * group.size)) if share > 0 else 0 for share in density]
    thresholds = group.largest(counts)
    return [
        Keep() if share == 1 else Keep(among=found) for share, found in zip(density, thresholds, strict=True)
    ]


@merge_method(
    "dare_linear",
    paper="Yu et al. 2024, Language models are super mario, arXiv:2311.03099",
    parameters=[WEIGHT, DENSITY, RESCALE, normalize(False), LAMBDA],
    base="required",
)
def dare_linear(
    group: TensorGroup, weight: Floats, density: Floats, rescale: bool, normalize: bool, lambda_: float
) -> Consensus:
    """The base plus weighted deltas of which random elements were dropped and the others scaled up.

    theta_0 + lambda sum_k w_k m_k delta_k / density_k with m_k ~ Bernoulli(density_k); without ``rescale`` not divided
    by density_k; with ``normalize`` divided by sum_k w_k. m_k depends on seed, tensor name, k and index alone.
    """
    return consensus(group, dropped(group, density, rescale), weight, False, normalize, lambda_)


@merge_method(
    "dare_ties",
    paper="Yu et al. 2024, Language models are super mario, arXiv:2311.03099",
    parameters=[WEIGHT, DENSITY, RESCALE, normalize(False), LAMBDA],
    base="required",
)
def dare_ties(
    group: TensorGroup, weight: Floats, density: Floats, rescale: bool, normalize: bool, lambda_: float
) -> Consensus:
    """Random elements of each delta, scaled up, where they agree with the sign of the weighted sum.

    v_k = w_k m_k delta_k / density_k as in dare_linear, elected and merged as in ties.
    """
    return consensus(group, dropped(group, density, rescale), weight, True, normalize, lambda_)


def dropped(group: TensorGroup, density: Floats, rescale: bool) -> list[Keep]:
    """For each model a random share ``density`` of its elements."""

    def keep(k: int, share: float) -> Keep:
        if share == 1:
            return Keep()
        if share == 0:
            return Keep(among=NOTHING)
        return Keep(probability=share, key=group.key, stream=k, rescale=1 / share if rescale else 1.0)

    return [keep(k, float(share)) for k, share in enumerate(fractions(group, "density", density))]


@merge_method(
    "breadcrumbs",
    paper="Davari & Belilovsky 2024, Model breadcrumbs, arXiv:2312.06795",
    parameters=[WEIGHT, DENSITY, GAMMA, normalize(False), LAMBDA],
    base="required",
)
def breadcrumbs(
    group: TensorGroup, weight: Floats, density: Floats, gamma: Floats, normalize: bool, lambda_: float
) -> Consensus:
    """The base plus weighted deltas without their largest and their smallest elements.

    theta_0 + lambda sum_k w_k m_k delta_k; m_k leaves out the share ``gamma`` of largest |delta_k| and keeps the share
    ``density`` that follows; with ``normalize`` divided by sum_k w_k.
    """
    return consensus(group, middle(group, density, gamma), weight, False, normalize, lambda_)


@merge_method(
    "breadcrumbs_ties",
    paper="Davari & Belilovsky 2024, Model breadcrumbs, arXiv:2312.06795",
    parameters=[WEIGHT, DENSITY, GAMMA, normalize(False), LAMBDA],
    base="required",
)
def breadcrumbs_ties(
    group: TensorGroup, weight: Floats, density: Floats, gamma: Floats, normalize: bool, lambda_: float
) -> Consensus:
    """Deltas without their largest and smallest elements, where they agree with the sign of the weighted sum.

    v_k = w_k m_k delta_k as in breadcrumbs, elected and merged as in ties.
    """
    return consensus(group, middle(group, density, gamma), weight, True, normalize, lambda_)


def middle(group: TensorGroup, density: Floats, gamma: Floats) -> list[Keep]:
    """For each model the share ``density`` after its share ``gamma`` of largest elements.

    Fewer of the largest are left out where gamma + density > 1.
    """
    density, gamma = fractions(group, "density", density), fractions(group, "gamma", gamma)
    if not group.size or min(density) == 1:
        return [Keep() for _ in density]
    kept = [int(share * group.size) for share in density]
    outliers = [min(int(g * group.size), group.size - count) for g, count in zip(gamma, kept, strict=True)]
    outside = group.largest(outliers)
    among = group.largest([count + out for count, out in zip(kept, outliers, strict=True)])
    return [
        Keep() if share == 1 else Keep(among=inner, outside=outer)
        for share, inner, outer in zip(density, among, outside, strict=True)
    ]
