"""Names of one tensor: a state holds a copy for each (tied embeddings), and a merge must not tear them apart."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from toolkit.merging.states import State

# Elements by which most tensors are told apart.
SAMPLE = 64


def tied_names(states: Sequence[State], fishers: Sequence[State]) -> dict[str, str]:
    """For each name whose tensor equals, in every state, that of another name: that other name.

    A random mask differs from name to name, and a Fisher has one of the names only: merged one by one, tied tensors
    would come apart. Vectors do not count: untrained biases are equal without being tied.

    Args:
        states: of the same names and shapes.
        fishers: a name that these have is the one that stays.
    """
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in states[0].items():
        if tensor.dim() > 1 and tensor.numel() and tensor.is_floating_point():
            groups[(tensor.shape, tensor.dtype, _sample(tensor))].append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        ranked = sorted(names, key=lambda name: -sum(name in fisher for fisher in fishers))
        for place, name in enumerate(ranked):
            for other in ranked[:place]:
                if other not in found and all(torch.equal(state[name], state[other]) for state in states):
                    found[name] = other
                    break
    return found


def without(state: State, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The state without the names that repeat others."""
    return {name: tensor for name, tensor in state.items() if name not in names}


def restored(state: State, names: Mapping[str, str], order: Sequence[str]) -> dict[str, torch.Tensor]:
    """The state with them again, each a tensor of its own, in the given order."""
    return {name: state[name] if name in state else state[names[name]].clone() for name in order}


def _sample(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(tensor.reshape(-1)[:SAMPLE].tolist())
