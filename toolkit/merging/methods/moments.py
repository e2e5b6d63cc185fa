"""Adam's second moments as Fisher information: what ``from_optimizer`` merges with."""

import torch
from torch import nn

from toolkit.errors import ModelError
from toolkit.merging.fisher import Fisher
from toolkit.merging.fisher.names import file_names


@torch.no_grad()
def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Fisher:
    """F = v / (1 - beta_2^t) of every parameter that the optimizer has moved.

    Args:
        model: whose parameters they are; a PEFT model's get the names of the adapter's file.
        optimizer: Adam, AdamW or another one with ``exp_avg_sq``, ``step`` and ``betas``.

    Returns:
        float32 tensors on the CPU, with their norms; ``num_examples`` is the number of steps.

    Raises:
        ModelError: the optimizer has no second moments.

    Source: Kingma & Ba 2015, Adam, arXiv:1412.6980, section 3.
    """
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    names = file_names(model, parameters)
    beta_2 = {
        id(tensor): group["betas"][1]
        for group in optimizer.param_groups
        if "betas" in group
        for tensor in group["params"]
    }
    moments: dict[str, torch.Tensor] = {}
    steps = 0
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state or id(parameter) not in beta_2:
            continue
        step = int(state["step"])
        steps = max(steps, step)
        bias = 1.0 - beta_2[id(parameter)] ** step
        moments[names[name]] = (state["exp_avg_sq"].double() / bias).float().cpu()
    if not moments:
        raise ModelError(
            f"{type(optimizer).__name__} holds no second moments of this model's parameters",
            hint="use Adam or AdamW, and take at least one step before",
        )
    return Fisher(moments, steps, "second moments of Adam", "", "")
