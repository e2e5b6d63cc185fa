"""SCE: select the elements on which models differ, calculate a weight for each model, erase minority signs."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from toolkit.merging.group import MemoryReader, TensorGroup
from toolkit.merging.methods.weights import fractions
from toolkit.merging.registry import Parameter, merge_method

if TYPE_CHECKING:
    import torch

    from toolkit.merging.methods.rows import Rows


@merge_method(
    "sce",
    paper="Wan et al. 2024, FuseChat, arXiv:2408.07990",
    parameters=[Parameter("select_topk", float, 1.0, bounds=(0.0, 1.0))],
    base="required",
)
def sce(group: TensorGroup, select_topk: float) -> "torch.Tensor":
    """Deltas where the models differ most, weighted by their mean square, of the sign of their sum.

    select: d_k = delta_k at the share ``select_topk`` of the elements of non-zero variance over the models, those of
    largest variance, else 0; calculate: w_k = mean(d_k^2) / sum_j mean(d_j^2); erase: s = sign(sum_k d_k), + for 0;
    theta_0 + (sum of w_k d_k over the k with sign(d_k) = s) / (sum of their w_k).
    """
    from toolkit.merging.methods import rows as by_rows

    fractions(group, "select_topk", np.array([select_topk]))
    chosen = selected(group, select_topk)
    result = by_rows.Result(group)
    squares = np.zeros(group.num_models)
    for rows in by_rows.blocks_of_rows(group):
        squares += _selected_deltas(rows, chosen).square().sum((1, 2)).cpu().numpy()
    # No delta is left where the sum is zero: any weights give the base.
    weights = squares / (squares.sum() or 1.0)
    for rows in by_rows.blocks_of_rows(group):
        assert rows.base_RC is not None  # the method requires one
        d_KRC = _selected_deltas(rows, chosen)
        weight_KRC = by_rows.per_model(weights, d_KRC) * by_rows.agreeing(d_KRC)
        merged_RC = by_rows.divided((d_KRC * weight_KRC).sum(0), weight_KRC.sum(0))
        result.put(rows, rows.base_RC + merged_RC)
    return result.tensor()


def selected(group: TensorGroup, share: float) -> "torch.Tensor | None":
    """[N] which elements of the tensor are selected; None for all. Of equal variances the first ones are."""
    import torch

    from toolkit.merging.methods import rows as by_rows

    if share == 1 or not group.size:
        return None
    # In float32, so that what differs by the order of the models alone is equal; where the backend can read it.
    variance = torch.zeros(group.size, dtype=torch.float32, device=group.models[0].span(0, 1).device)
    for rows in by_rows.blocks_of_rows(group):
        values = rows.delta_KRC.var(0, correction=0).reshape(-1)
        variance[rows.start : rows.start + len(values)] = values
    count = int(int(variance.count_nonzero()) * share)
    (threshold,) = replace(group, models=(MemoryReader.of(variance, "variance"),), base=None).largest([count])
    bits = variance.view(torch.int32)
    chosen = bits > min(threshold.bits, np.iinfo(np.int32).max)
    chosen[: threshold.last + 1] |= bits[: threshold.last + 1] == threshold.bits
    return chosen.to(group.device)


def _selected_deltas(rows: "Rows", chosen: "torch.Tensor | None") -> "torch.Tensor":
    delta_KRC = rows.delta_KRC
    if chosen is None:
        return delta_KRC
    part = chosen[rows.start : rows.start + delta_KRC[0].numel()]
    return delta_KRC * part.view(delta_KRC.shape[1:])
