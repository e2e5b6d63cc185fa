"""Names that parameters have in the safetensors file of the model or adapter that they belong to."""

from collections.abc import Iterable

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn


def file_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """File names by parameter names.

    A whole model's are those of its state dict. PEFT leaves the adapter's name and its own wrappers out.
    """
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    adapters = [model.active_adapter] if isinstance(model.active_adapter, str) else model.active_adapter
    saved: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        saved |= get_peft_model_state_dict(model, adapter_name=adapter)
    by_storage = {(t.data_ptr(), tuple(t.shape)): name for name, t in saved.items()}
    parameters = dict(model.named_parameters())
    return {
        name: by_storage.get((parameters[name].data_ptr(), tuple(parameters[name].shape)), name)
        for name in names
    }
