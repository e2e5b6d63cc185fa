"""What most methods do with weights: normalise them, and place scaled deltas around a base."""

from math import fsum

import numpy as np

from toolkit.errors import ConfigError
from toolkit.merging.group import TensorGroup
from toolkit.merging.registry import REQUIRED, Parameter
from toolkit_kernels.rules import Floats, WeightedSum

WEIGHT = Parameter("weight", float, REQUIRED, per_model=True)
EQUAL_WEIGHT = Parameter("weight", float, 1.0, per_model=True)
LAMBDA = Parameter("lambda", float, 1.0)

# Weights whose sum is this small beside their magnitudes cancel out: what remains is rounding.
CANCELLED = 1e-12


def shares(group: TensorGroup, weights: Floats) -> Floats:
    """w_k / sum_k w_k; the same in any order of the models.

    Raises:
        ConfigError: the weights add up to zero.
    """
    total = fsum(weights)
    if abs(total) <= CANCELLED * fsum(abs(weights)):
        listed = ", ".join(f"{weight:g}" for weight in weights)
        raise ConfigError([f"{group.name}: the weights {listed} add up to 0, so there is no mean to form"])
    return np.asarray(weights, np.float64) / total


def importances(group: TensorGroup, weights: Floats) -> Floats:
    """The weights, as factors of something that is positive.

    Raises:
        ConfigError: a weight is negative.
    """
    if min(weights) < 0:
        raise ConfigError([f"{group.name}: weight {min(weights):g} is negative, and importances are not"])
    return np.asarray(weights, np.float64)


def around_base(group: TensorGroup, factors: Floats) -> WeightedSum:
    """theta_0 + sum_k c_k delta_k; sum_k c_k theta_k where there is no base."""
    return WeightedSum(factors, None if group.base is None else 1.0 - fsum(factors))


def fractions(group: TensorGroup, name: str, values: Floats) -> Floats:
    """The values of a parameter that is a share of something.

    Raises:
        ConfigError: a value is below 0 or above 1.
    """
    for value in values:
        if not 0 <= value <= 1:
            raise ConfigError([f"{group.name}: {name} {value:g} does not lie between 0 and 1"])
    return np.asarray(values, np.float64)
