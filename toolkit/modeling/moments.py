"""Adam's second moments: a running mean of squared gradients, which training computes anyway."""

from collections.abc import Mapping

import torch

from toolkit.errors import ModelError


@torch.no_grad()
def unbiased_second_moments(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], int]:
    """v / (1 - beta_2^t) of every parameter that the optimizer has moved, and the number of its steps t.

    Args:
        parameters: by the names that the moments shall have.
        optimizer: Adam, AdamW or another one with ``exp_avg_sq``, ``step`` and ``betas``.

    Returns:
        float32 tensors on the devices of the parameters, and the largest t.

    Raises:
        ModelError: the optimizer has no second moments.

    Source: Kingma & Ba 2015, Adam, arXiv:1412.6980, section 3.
    """
    beta_2 = {
        id(tensor): group["betas"][1]
        for group in optimizer.param_groups
        if "betas" in group
        for tensor in group["params"]
    }
    moments: dict[str, torch.Tensor] = {}
    num_steps = 0
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state or id(parameter) not in beta_2:
            continue
        step = int(state["step"])
        num_steps = max(num_steps, step)
        bias = 1.0 - beta_2[id(parameter)] ** step
        moments[name] = (state["exp_avg_sq"].double() / bias).float()
    if not moments:
        raise ModelError(
            f"{type(optimizer).__name__} holds no second moments of this model's parameters",
            hint="use Adam or AdamW, and take at least one step before",
        )
    return moments, num_steps
