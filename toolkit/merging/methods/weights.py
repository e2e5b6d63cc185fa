"""What most methods do with weights: normalise them, and place scaled deltas around a base."""

from collections.abc import Mapping
from math import fsum
from typing import Any

import numpy as np

from toolkit.errors import ConfigError
from toolkit.merging.group import TensorGroup
from toolkit.merging.registry import REQUIRED, Parameter, WeightsCheck
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
    if problem := cancelled(weights):
        raise ConfigError([f"{group.name}: {problem}"])
    return np.asarray(weights, np.float64) / fsum(weights)


def cancelled(weights: Floats) -> str | None:
    """What is wrong with weights that add up to zero; None where they do not."""
    if abs(fsum(weights)) > CANCELLED * fsum(abs(weights)):
        return None
    return f"the weights {', '.join(f'{weight:g}' for weight in weights)} add up to 0, so there is no mean to form"


def have_a_mean(switch: str | None = None) -> WeightsCheck:
    """The check of a method that divides its weights by their sum, where the parameter ``switch`` is on."""

    def check(arguments: Mapping[str, Any]) -> str | None:
        return cancelled(arguments["weight"]) if switch is None or arguments[switch] else None

    return check


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
