"""Methods that ask where models have moved at all: RAM, RAM+, Arcee fusion."""

from typing import TYPE_CHECKING

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.registry import Parameter, merge_method

if TYPE_CHECKING:
    import torch

    from toolkit.merging.methods.rows import Rows

MOVED = Parameter("epsilon", float, 1e-5)
# Added to probabilities, so that none is zero.
SMALLEST = 1e-8


@merge_method(
    "ram",
    paper="Reinforced agent merging, arXiv:2601.13572",
    parameters=[MOVED],
    base="required",
)
def ram(group: TensorGroup, epsilon: float) -> "torch.Tensor":
    """The base plus, for each element, the mean delta of the models that have moved it.

    theta_0 + sum_k m_k delta_k / max(sum_k m_k, 1) with m_k = 1 where |delta_k| > epsilon, else 0: what one model alone
    has learned is not divided by K.
    """
    return _merged(group, epsilon, np.ones(group.num_models))


@merge_method(
    "ramplus_tl",
    paper="Reinforced agent merging, arXiv:2601.13572",
    parameters=[Parameter("r", float, 0.1), Parameter("alpha", float, 0.2), MOVED],
    base="required",
)
def ramplus_tl(group: TensorGroup, r: float, alpha: float, epsilon: float) -> "torch.Tensor":
    """RAM with what one model alone has moved scaled up, to make up for what is averaged.

    As ram, but with delta_k times 1 + r min(s_k / u_k, alpha) where model k alone has moved an element; of its moved
    elements in this tensor u_k are moved by no other model and s_k are.
    """
    from toolkit.merging.methods import rows as by_rows

    alone, shared = np.zeros(group.num_models), np.zeros(group.num_models)
    for rows in by_rows.blocks_of_rows(group):
        moved_KRC = rows.delta_KRC.abs() > epsilon
        alone_KRC = moved_KRC & (moved_KRC.sum(0) == 1)
        alone += alone_KRC.sum((1, 2)).cpu().numpy()
        shared += (moved_KRC & ~alone_KRC).sum((1, 2)).cpu().numpy()
    return _merged(group, epsilon, 1 + r * np.clip(shared / np.maximum(alone, 1), 0, alpha))


def _merged(group: TensorGroup, epsilon: float, factors: np.ndarray) -> "torch.Tensor":
    """RAM; ``factors`` [K] of the elements that one model alone has moved."""
    import torch

    from toolkit.merging.methods import rows as by_rows

    result = by_rows.Result(group)
    for rows in by_rows.blocks_of_rows(group):
        assert rows.base_RC is not None  # the method requires one
        moved_KRC = rows.delta_KRC.abs() > epsilon
        count_RC = moved_KRC.sum(0)
        factor_KRC = torch.where(count_RC == 1, by_rows.per_model(factors, rows.theta_KRC), 1.0)
        total_RC = torch.where(moved_KRC, rows.delta_KRC * factor_KRC, 0.0).sum(0)
        result.put(rows, rows.base_RC + total_RC / count_RC.clamp(min=1))
    return result.tensor()


@merge_method(
    "arcee_fusion",
    paper="Arcee fusion, arcee.ai",
    base="required",
    num_models=(1, 1),
)
def arcee_fusion(group: TensorGroup) -> "torch.Tensor":
    """The base with those elements of a model that changed most, in the rows that changed most.

    theta_1 where I >= median(I) + 1.5 (Q3(I) - Q1(I)), else theta_0, with I = |theta_1 - theta_0| KL(p_1 || p_0) and
    p = softmax of the element's row + 1e-8; quartiles over the whole tensor.
    """
    import torch

    from toolkit.merging.methods import rows as by_rows

    result = by_rows.Result(group)
    if not group.size:
        return result.tensor()
    importance = torch.empty(group.size, dtype=torch.float32, device=group.device)
    for rows in by_rows.blocks_of_rows(group):
        importance[rows.start : rows.start + rows.theta_KRC.numel()] = _importance(rows).flatten()
    # Element floor(q (n - 1)) of the sorted ones.
    quartiles = [importance.kthvalue(int(q * (group.size - 1)) + 1).values for q in (0.25, 0.5, 0.75)]
    threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])
    for rows in by_rows.blocks_of_rows(group):
        assert rows.base_RC is not None  # the method requires one
        theta_RC = rows.theta_KRC[0]
        chosen_RC = importance[rows.start : rows.start + theta_RC.numel()].view_as(theta_RC) >= threshold
        result.put(rows, torch.where(chosen_RC, theta_RC, rows.base_RC))
    return result.tensor()


def _importance(rows: "Rows") -> "torch.Tensor":
    """[R, C] in float64."""
    assert rows.base_RC is not None  # the method requires one
    p_RC, q_RC = (values.softmax(dim=1) + SMALLEST for values in (rows.theta_KRC[0], rows.base_RC))
    divergence_R1 = (p_RC * (p_RC / q_RC).log()).sum(1, keepdim=True)
    return (rows.theta_KRC[0] - rows.base_RC).abs() * divergence_R1
