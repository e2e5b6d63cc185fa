"""NaN and infinity in inputs that need not show in a result: elements that a rule leaves out, or replaces."""

import numpy as np

from toolkit.merging.group import TensorGroup
from toolkit_kernels.backend import Backend
from toolkit_kernels.rules import Consensus, FisherMean, Inputs, Keep, Piece


def num_hidden(backend: Backend, piece: Piece) -> int:
    """How many elements of the inputs are NaN or infinite where that need not show in the result."""
    rule, inputs = piece.rule, piece.inputs
    if isinstance(rule, FisherMean):  # max(NaN, floor) may be the floor
        return int(np.sum(backend.non_finite(Inputs(inputs.fisher))))
    if isinstance(rule, Consensus) and (rule.elect or any(_may_drop(keep) for keep in rule.keep)):
        return int(np.sum(backend.non_finite(Inputs(inputs.theta, inputs.base))))
    return 0


def num_in_group(group: TensorGroup) -> int:
    """How many elements of the models and the base are NaN or infinite; for methods that read them as they like."""
    counts = group.parallel_map(group.backend.non_finite, group.pieces(base=True))
    return int(sum(np.sum(count) for count in counts))


def _may_drop(keep: Keep) -> bool:
    return keep.among is not None or keep.outside is not None or keep.probability is not None
