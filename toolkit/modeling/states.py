"""The tensors of a model that travel: an adapter, or a full state dict."""

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict


def trained_state(model: torch.nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    """Copies of the trained tensors by name, in their own dtype and on their own device.

    Args:
        model: a PeftModel where ``adapter`` is given.
        adapter: name of the adapter; None for the whole state dict. Names of an adapter's tensors do not contain the
            adapter's name, so that adapters of several participants have the same keys.
    """
    return {name: tensor.detach().clone() for name, tensor in _tensors(model, adapter).items()}


def trained_parameters(model: torch.nn.Module, adapter: str | None) -> dict[str, torch.nn.Parameter]:
    """The parameters behind :func:`trained_state`, by the same names; tied tensors come once for each of their names.

    Buffers are not among them; frozen parameters are.
    """
    # Views of one storage differ in the offset or the shape, so that both together tell them apart.
    by_place = {(p.data_ptr(), p.shape): p for p in model.parameters()}
    found = {name: by_place.get((t.data_ptr(), t.shape)) for name, t in _tensors(model, adapter).items()}
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def trained_in_float32(model: torch.nn.Module) -> None:
    """Hold what is trained in float32, in place, before an optimizer refers to it.

    In bfloat16 most updates of a small learning rate round to nothing. TRL casts the adapters of a quantized base to
    bfloat16, PEFT leaves the layers that are trained whole in the base's type.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _tensors(model: torch.nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    if adapter is None:
        return model.state_dict()
    assert isinstance(model, PeftModel)
    # PEFT would add the base's embeddings where they are adapted, and ask the hub each time whether they were resized.
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@torch.no_grad()
def load_trained_state(
    model: torch.nn.Module, adapter: str | None, state: Mapping[str, torch.Tensor]
) -> None:
    """Copy ``state`` into the trained tensors, in place: optimizers keep their references.

    Raises:
        ValueError: names or shapes differ from :func:`trained_state`; nothing was changed.
    """
    own = _tensors(model, adapter)
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ValueError(f"the state does not fit the model: missing {missing[:3]}, foreign {foreign[:3]}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}")
    for name, tensor in own.items():
        tensor.copy_(state[name])
