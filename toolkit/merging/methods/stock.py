"""Model stock: how far to trust the mean of the models, from the angles between their deltas."""

from typing import TYPE_CHECKING

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit.merging.methods.spherical import lengths
from toolkit.merging.methods.weights import around_base
from toolkit.merging.registry import Parameter, merge_method
from toolkit_kernels.rules import Floats, WeightedSum

if TYPE_CHECKING:
    import torch

SINGULAR = 1e-6


@merge_method(
    "model_stock",
    paper="Jang et al. 2024, Model stock, arXiv:2403.19522",
    parameters=[Parameter("filter_wise", bool, False)],
    base="required",
    num_models=(2, None),
)
def model_stock(group: TensorGroup, filter_wise: bool) -> "WeightedSum | torch.Tensor":
    """The base moved towards the mean of the models, the farther the more their deltas agree.

    t mean_k theta_k + (1 - t) theta_0 with t = K c / (1 + (K - 1) c), c the mean cosine of all pairs of deltas (0 for a
    delta of zero); t = 0 where the denominator vanishes. With ``filter_wise`` each row has its own t.
    """
    count = group.num_models
    if filter_wise and group.size:
        return _by_rows(group)
    t = float(ratio(group.gram(deltas=True)[None])[0])
    return around_base(group, np.full(count, t / count))


def ratio(gram: Floats) -> Floats:
    """[R] the t of each [K, K] Gram matrix of deltas in [R, K, K]."""
    count = gram.shape[-1]
    norms = np.stack([lengths(matrix) for matrix in gram])
    products = norms[:, :, None] * norms[:, None, :]
    cosines = np.divide(gram, products, where=products > 0, out=np.zeros_like(gram)).clip(-1, 1)
    first, second = np.triu_indices(count, 1)
    c = cosines[:, first, second].mean(axis=1)
    denominator = 1 + (count - 1) * c
    singular = abs(denominator) < SINGULAR
    return np.where(singular, 0.0, count * c / np.where(singular, 1.0, denominator))


def _by_rows(group: TensorGroup) -> "torch.Tensor":
    import torch

    from toolkit.merging.methods import rows as by_rows

    result = by_rows.Result(group)
    for rows in by_rows.blocks_of_rows(group):
        assert rows.base_RC is not None  # the method requires one
        delta_RKC = rows.delta_KRC.transpose(0, 1)
        t_R = torch.from_numpy(ratio((delta_RKC @ delta_RKC.mT).cpu().numpy())).to(delta_RKC.device)
        result.put(rows, rows.base_RC + t_R[:, None] * delta_RKC.mean(1))
    return result.tensor()
