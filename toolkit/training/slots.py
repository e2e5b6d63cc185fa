"""What an optimizer remembers of each tensor: its slots, such as ``exp_avg`` and ``momentum_buffer``."""

from collections.abc import Mapping

import torch

from toolkit.errors import ModelError

STEP = "step"
"""Adam counts its steps beside its moments; a count is no slot."""


def optimizer_slots(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the optimizer's slots: slot → parameter's name → tensor.

    Args:
        parameters: by the names that the tensors shall have.
        optimizer: any that holds floating-point tensors.

    Raises:
        ModelError: the optimizer holds its slots in another form, such as 8 bits with scales.
    """
    copies: dict[str, dict[str, torch.Tensor]] = {}
    for slot, tensors in _slots(parameters, optimizer).items():
        copies[slot] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return copies


@torch.no_grad()
def load_optimizer_slots(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    slots: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Copy ``slots`` into the optimizer, in place; counts of steps stay.

    Raises:
        ModelError: as :func:`optimizer_slots`.
        ValueError: slots, names or shapes differ from those of :func:`optimizer_slots`; nothing was changed.
    """
    own = _slots(parameters, optimizer)
    _check_names("slots", own, slots)
    for slot, tensors in own.items():
        _check_names(f"tensors of {slot}", tensors, slots[slot])
        for name, tensor in tensors.items():
            if slots[slot][name].shape != tensor.shape:
                shapes = f"{tuple(slots[slot][name].shape)}, the optimizer has {tuple(tensor.shape)}"
                raise ValueError(f"{slot} of {name}: shape {shapes}")
    for slot, tensors in own.items():
        for name, tensor in tensors.items():
            tensor.copy_(slots[slot][name])


def _slots(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if slot == STEP or not isinstance(value, torch.Tensor):
                continue
            if not value.is_floating_point():
                raise ModelError(
                    f"{type(optimizer).__name__} holds {slot} of {name} as {value.dtype}, which cannot be merged",
                    hint="use an optimizer with floating-point moments, such as --optim adamw_torch, or "
                    "--optimizer-on-merge keep",
                )
            found.setdefault(slot, {})[name] = value
    return found


def _check_names(what: str, own: Mapping[str, object], given: Mapping[str, object]) -> None:
    missing, foreign = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or foreign:
        raise ValueError(f"{what} do not fit the optimizer: missing {missing[:3]}, foreign {foreign[:3]}")
