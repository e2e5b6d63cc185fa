"""A model as the estimate needs it, and given back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def as_function(model: nn.Module) -> Iterator[None]:
    """In evaluation mode (no dropout, statistics fixed), gradients on; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def differentiated_by(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only ``parameters`` require gradients inside; flags and gradients of all are restored."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
