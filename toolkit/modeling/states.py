"""The tensors of a model that travel: an adapter, or a full state dict."""

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict


def trained_state(model: torch.nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    """Copies of the trained tensors by name, in their own dtype and on their own device.

    Args:
        model: a PeftModel where ``adapter`` is given.
        adapter: name of the adapter; None for the whole state dict. Names of an adapter's tensors do not contain the
            adapter's name, so that adapters of several participants have the same keys.
    """
    if adapter is None:
        tensors = model.state_dict()
    else:
        assert isinstance(model, PeftModel)
        tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def load_trained_state(
    model: torch.nn.Module, adapter: str | None, state: Mapping[str, torch.Tensor]
) -> None:
    """Copy ``state`` into the trained tensors, in place: optimizers keep their references.

    Raises:
        ValueError: names or shapes differ from :func:`trained_state`; nothing was changed.
    """
    own = trained_state(model, adapter)
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ValueError(f"the state does not fit the model: missing {missing[:3]}, foreign {foreign[:3]}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}")
    if adapter is None:
        model.load_state_dict(state)
    else:
        set_peft_model_state_dict(model, dict(state), adapter_name=adapter)
