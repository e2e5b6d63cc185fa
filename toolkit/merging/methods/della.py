"""DELLA: elements of a delta are dropped at random, the small ones of a row more often than the large ones."""

from typing import TYPE_CHECKING

import numpy as np

from toolkit.errors import ConfigError
from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.task_vectors import DENSITY, RESCALE, divisor, normalize
from toolkit.merging.methods.weights import LAMBDA, WEIGHT, fractions
from toolkit.merging.registry import Parameter, merge_method
from toolkit_kernels.philox import random_words
from toolkit_kernels.rules import Floats

if TYPE_CHECKING:
    import torch

EPSILON = Parameter("epsilon", float, 0.15, per_model=True)


@merge_method(
    "della",
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    parameters=[WEIGHT, DENSITY, EPSILON, RESCALE, normalize(True), LAMBDA],
    base="required",
)
def della(
    group: TensorGroup,
    weight: Floats,
    density: Floats,
    epsilon: Floats,
    rescale: bool,
    normalize: bool,
    lambda_: float,
) -> "torch.Tensor":
    """Random elements of each delta, large ones rather than small ones, elected and merged as in ties.

    v_k = w_k m_k delta_k / p_k with m_k ~ Bernoulli(p_k); p_k rises with the rank of |delta_k| in its row, from density
    - epsilon for the smallest to density + epsilon for the largest. Without ``rescale`` not divided by p_k.
    """
    return merged(group, weight, density, epsilon, rescale, lambda_, elect=True, normalize=normalize)


@merge_method(
    "della_linear",
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    parameters=[WEIGHT, DENSITY, EPSILON, RESCALE, normalize(False), LAMBDA],
    base="required",
)
def della_linear(
    group: TensorGroup,
    weight: Floats,
    density: Floats,
    epsilon: Floats,
    rescale: bool,
    normalize: bool,
    lambda_: float,
) -> "torch.Tensor":
    """The base plus weighted deltas of which random elements were dropped, small ones rather than large ones.

    theta_0 + lambda sum_k v_k with v_k as in della; with ``normalize`` divided by sum_k w_k.
    """
    return merged(group, weight, density, epsilon, rescale, lambda_, elect=False, normalize=normalize)


def merged(
    group: TensorGroup,
    weight: Floats,
    density: Floats,
    epsilon: Floats,
    rescale: bool,
    lambda_: float,
    *,
    elect: bool,
    normalize: bool,
) -> "torch.Tensor":
    """Both methods, block of rows by block of rows."""
    import torch

    from toolkit.merging.methods import rows as by_rows

    _check(group, density, epsilon)
    result = by_rows.Result(group)
    for rows in by_rows.blocks_of_rows(group):
        assert rows.base_RC is not None  # the method requires one
        v_KRC = torch.stack(
            [
                weight[k]
                * drop(group, rows.start, k, delta_RC, float(density[k]), float(epsilon[k]), rescale)
                for k, delta_RC in enumerate(rows.delta_KRC)
            ]
        )
        weight_K11 = by_rows.per_model(weight, v_KRC)
        if elect:
            counted_KRC = by_rows.agreeing(v_KRC)
            m_RC = (v_KRC * counted_KRC).sum(0)
            if normalize:
                m_RC = by_rows.divided(m_RC, (weight_K11 * counted_KRC).sum(0))
        else:
            m_RC = v_KRC.sum(0) / (divisor(weight) if normalize else 1.0)
        result.put(rows, rows.base_RC + lambda_ * m_RC)
    return result.tensor()


def drop(
    group: TensorGroup,
    start: int,
    k: int,
    delta_RC: "torch.Tensor",
    density: float,
    epsilon: float,
    rescale: bool,
) -> "torch.Tensor":
    """[R, C] the elements of rows of delta_k that stay, divided by their probability."""
    import torch

    if density == 1:
        return delta_RC
    if density == 0:
        return torch.zeros_like(delta_RC)
    p_RC = probabilities(delta_RC, density, epsilon)
    words = random_words(group.key, k, start, delta_RC.numel()).astype(np.int64)
    stays_RC = torch.from_numpy(words).to(delta_RC.device).view_as(delta_RC) < torch.floor(p_RC * 2.0**32)
    return torch.where(stays_RC, delta_RC / p_RC if rescale else delta_RC, 0.0)


def probabilities(delta_RC: "torch.Tensor", density: float, epsilon: float) -> "torch.Tensor":
    """[R, C] density - epsilon + 2 epsilon r / (C - 1), r = 0 ... C - 1 the rank of |delta| in its row.

    Magnitudes are compared in float32, equal ones ranked by index. A row of one element has ``density``.
    """
    length = delta_RC.shape[1]
    if length == 1:
        return delta_RC.new_full(delta_RC.shape, density)
    evenly_C = delta_RC.new_tensor(np.linspace(density - epsilon, density + epsilon, length))
    order_RC = _order(delta_RC.float().abs())
    return delta_RC.new_empty(delta_RC.shape).scatter_(1, order_RC, evenly_C.expand_as(order_RC))


def _order(magnitude_RC: "torch.Tensor") -> "torch.Tensor":
    """[R, C] indices of each row, from its smallest magnitude to its largest."""
    import torch

    # As integers, bit patterns of float32 have the order of the magnitudes; index and all they are one number to sort.
    index_C = torch.arange(magnitude_RC.shape[1], device=magnitude_RC.device)
    keys_RC = (magnitude_RC.view(torch.int32).long() << 32) | index_C
    if keys_RC.device.type == "cpu":
        keys_RC.numpy().sort(axis=1)  # several times as fast as torch's
    else:
        keys_RC = keys_RC.sort(dim=1).values
    return keys_RC & 0xFFFFFFFF


def _check(group: TensorGroup, density: Floats, epsilon: Floats) -> None:
    fractions(group, "density", density)
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not (share - spread > 0 and share + spread < 1 and spread >= 0):
            raise ConfigError(
                [
                    f"{group.name}: density {share:g} with epsilon {spread:g} gives probabilities from "
                    f"{share - spread:g} to {share + spread:g}; they must lie between 0 and 1"
                ],
                hint="choose a smaller epsilon",
            )
