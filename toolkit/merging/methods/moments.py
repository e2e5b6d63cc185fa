"""Adam's second moments as Fisher information: what ``from_optimizer`` merges with."""

import torch
from torch import nn

from toolkit.merging.fisher import Fisher
from toolkit.merging.fisher.names import file_names
from toolkit.modeling.moments import unbiased_second_moments


def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Fisher:
    """F = v / (1 - beta_2^t) of every parameter that the optimizer has moved.

    Args:
        model: whose parameters they are; a PEFT model's get the names of the adapter's file.
        optimizer: Adam, AdamW or another one with ``exp_avg_sq``, ``step`` and ``betas``.

    Returns:
        float32 tensors on the CPU, with their norms; ``num_examples`` is the number of steps.

    Raises:
        ModelError: the optimizer has no second moments.
    """
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    names = file_names(model, parameters)
    moments, num_steps = unbiased_second_moments({names[n]: p for n, p in parameters.items()}, optimizer)
    tensors = {name: tensor.cpu() for name, tensor in moments.items()}
    return Fisher(tensors, num_steps, "second moments of Adam", "", "")
