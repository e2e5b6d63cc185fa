"""Methods that need nothing but the elements: linear, passthrough, nearswap."""

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.weights import WEIGHT, have_a_mean, shares
from toolkit.merging.registry import REQUIRED, Parameter, merge_method
from toolkit_kernels.rules import Floats, NearSwap, WeightedSum


@merge_method(
    "linear",
    paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    parameters=[WEIGHT, Parameter("normalize", bool, True)],
    check=have_a_mean("normalize"),
)
def linear(group: TensorGroup, weight: Floats, normalize: bool) -> WeightedSum:
    """Weighted mean of the models.

    sum_k w_k theta_k / sum_k w_k; with ``normalize: false`` the sum itself.
    """
    return WeightedSum(shares(group, weight) if normalize else weight)


@merge_method(
    "passthrough",
    paper="mergekit",
    parameters=[Parameter("scale", float, 1.0, per_model=True)],
    num_models=(1, 1),
)
def passthrough(group: TensorGroup, scale: Floats) -> WeightedSum:
    """One model as it is, or scaled.

    scale theta_0: for models stacked from layers of several ones.
    """
    return WeightedSum(np.asarray(scale, np.float64))


@merge_method(
    "nearswap",
    paper="alchemonaut, QuartetAnemoi-70B-t0.0001 (model card)",
    parameters=[Parameter("t", float, REQUIRED)],
    base="required",
    num_models=(1, 1),
)
def nearswap(group: TensorGroup, t: float) -> NearSwap:
    """A model where it is near the base, and the base moved a step towards it where it is far.

    theta_0 + min(1, t / |theta_1 - theta_0|) (theta_1 - theta_0): no element moves by more than t.
    """
    return NearSwap(max(t, 0.0))
