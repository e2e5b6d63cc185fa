"""The optimizer's side of a merge: moments of several participants become one (``--optimizer-on-merge merge``)."""

from collections.abc import Mapping, Sequence

import torch

from toolkit.errors import InputError, ModelError
from toolkit.merging.memory import merge_state_dicts

Slots = Mapping[str, Mapping[str, torch.Tensor]]
"""Slot (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``, ...) -> tensors by the names of the state."""


def merge_optimizer_states(
    slots: Sequence[Slots], weights: Sequence[float]
) -> dict[str, dict[str, torch.Tensor]]:
    """The weighted mean of every slot: sum_k w_k m_k / sum_k w_k, formed in float64 and rounded once.

    A mean of second moments is the second moment of a gradient drawn from one of the participants with the
    probabilities w_k, so it stays what Adam divides by. Step counts are not merged: every participant keeps its own.

    Args:
        slots: of K participants, as ``ParticipantTrainer.optimizer_state()`` gives them.
        weights: w_k, 0 or more; participants of weight 0 are left out.

    Raises:
        InputError: no weight above 0.
        ModelError: participants have other slots or tensors than the first.
    """
    used = [(entry, weight) for entry, weight in zip(slots, weights, strict=True) if weight > 0]
    if not used:
        raise InputError("optimizer states are merged by weights above 0, and there are none")
    first = used[0][0]
    for entry, _ in used:
        if different := first.keys() ^ entry.keys():
            raise ModelError(
                f"participants have different optimizer states: {min(different)} is not everywhere",
                hint="an optimizer has its state from its first step on",
            )
    kept = [weight for _, weight in used]
    return {
        slot: merge_state_dicts([entry[slot] for entry, _ in used], "linear", weight=kept) for slot in first
    }
