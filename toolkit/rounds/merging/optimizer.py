"""The optimizer's side of a merge (``--optimizer-on-merge merge``): moments as one state that merges like any other.

Moments are merged by a weighted mean, with the weights of the states. A mean of second moments is the second moment of
a gradient drawn from one of the participants with the probabilities w_k, so it stays what Adam divides by. Step counts
are not merged: every participant keeps its own.
"""

from collections.abc import Mapping

from torch import Tensor

Slots = Mapping[str, Mapping[str, Tensor]]
"""Slot (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``, ...) -> tensors by the names of the state."""


def state_of_slots(slots: Slots) -> dict[str, Tensor]:
    """Slots, as ``ParticipantTrainer.optimizer_state()`` gives them, as one state: names ``SLOT/NAME``."""
    return {f"{slot}/{name}": tensor for slot, tensors in slots.items() for name, tensor in tensors.items()}


def slots_of_state(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The slots that :func:`state_of_slots` made a state of."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        slot, _, name = key.partition("/")
        slots.setdefault(slot, {})[name] = tensor
    return slots
