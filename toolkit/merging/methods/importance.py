"""Means weighted by importance: of a whole tensor (fisher_simple), or of each element (fisher, from_optimizer)."""

from math import inf

import numpy as np

from toolkit.errors import ConfigError
from toolkit.merging.group import FisherTensor, TensorGroup
from toolkit.merging.methods.spherical import lengths
from toolkit.merging.methods.weights import EQUAL_WEIGHT, have_a_mean, importances, shares
from toolkit.merging.registry import Parameter, merge_method
from toolkit_kernels.rules import FisherMean, Floats, WeightedSum

# What each model's Fisher is divided by, so that a model with large gradients does not count for more than others.
NORMS = {
    "model": lambda entry: entry.model_norm,
    "tensor": lambda entry: entry.norm,
    "none": lambda entry: 1.0,
}
FISHER_PARAMETERS = (
    EQUAL_WEIGHT,
    Parameter("fisher_normalize", str, "model", choices=tuple(NORMS)),
    Parameter("fisher_floor", float, 1e-6, bounds=(0.0, inf)),
)


@merge_method(
    "fisher_simple",
    paper="one scalar a tensor in the place of Matena & Raffel's Fisher, arXiv:2111.09832",
    parameters=[EQUAL_WEIGHT],
    check=have_a_mean(),
    base="optional",
)
def fisher_simple(group: TensorGroup, weight: Floats) -> WeightedSum:
    """Mean with one importance for each tensor of each model, from the parameters alone: no data is needed.

    sum_k w_k f_k theta_k / sum_k w_k f_k with f_k = |delta_k|, the distance that the model went from the base in this
    tensor, or f_k = |theta_k| where there is no base (L2 norms). The plain weighted mean where all f_k are zero.
    """
    weights = importances(group, weight)
    weighted = weights * lengths(group.gram(deltas=group.base is not None))
    return WeightedSum(shares(group, weighted if weighted.any() else weights))


@merge_method(
    "fisher",
    paper="Matena & Raffel 2022, Merging models with Fisher-weighted averaging, arXiv:2111.09832",
    parameters=FISHER_PARAMETERS,
    check=have_a_mean(),
    needs_fisher=True,
)
def fisher(
    group: TensorGroup, weight: Floats, fisher_normalize: str, fisher_floor: float
) -> FisherMean | WeightedSum:
    """Mean of each element, weighted by the diagonal Fisher information of the models.

    sum_k a_k f_k theta_k / sum_k a_k f_k with f_k = max(F_k, fisher_floor mean(F_k)), the mean over the tensor, and
    a_k = w_k / |F_k|, the L2 norm over the model (``fisher_normalize: model``), over this tensor (``tensor``) or none
    (``none``). The plain weighted mean where sum_k a_k f_k = 0, and for a tensor whose Fisher a model has not.
    """
    return _fisher_mean(group, weight, fisher_normalize, fisher_floor)


@merge_method(
    "from_optimizer",
    paper="OTA merging, arXiv:2509.11167, with the rule of arXiv:2111.09832",
    parameters=FISHER_PARAMETERS,
    check=have_a_mean(),
    needs_fisher=True,
)
def from_optimizer(
    group: TensorGroup, weight: Floats, fisher_normalize: str, fisher_floor: float
) -> FisherMean | WeightedSum:
    """Fisher-weighted mean with Adam's second moments in the place of the Fisher information.

    The rule of ``fisher`` with F_k = v_k / (1 - beta_2^t), Adam's running mean of squared gradients without its bias:
    free, as training has computed it (:func:`toolkit.merging.methods.moments.second_moments` takes it from an
    optimizer). It is of gradients of batches, so F_k is smaller, about by the batch size, than that of ``fisher``;
    normalised, only the proportions count.
    """
    return _fisher_mean(group, weight, fisher_normalize, fisher_floor)


def _fisher_mean(
    group: TensorGroup, weight: Floats, fisher_normalize: str, fisher_floor: float
) -> FisherMean | WeightedSum:
    if fisher_normalize not in NORMS:
        raise ConfigError([f"fisher_normalize is '{fisher_normalize}'; there are {', '.join(NORMS)}"])
    if not fisher_floor >= 0:
        raise ConfigError([f"fisher_floor is {fisher_floor:g}; it is a share of the mean, 0 or more"])
    weights = importances(group, weight)
    plain = shares(group, weights)
    entries = [entry for entry in group.fisher if entry is not None]
    if len(entries) < group.num_models:
        return WeightedSum(plain)
    # Floors are in the units of F_k, and the rule applies a_k to what it has floored: so both are normalised.
    floors = np.array([fisher_floor * entry.mean for entry in entries])
    return FisherMean(weights / _scales(entries, fisher_normalize), floors, plain)


def _scales(entries: list[FisherTensor], name: str) -> Floats:
    """What to divide each Fisher by; one where all of it is zero."""
    scales = np.array([NORMS[name](entry) for entry in entries], np.float64)
    return np.where(scales > 0, scales, 1.0)
