"""How the per-example gradients of a layer's parameters follow from its input and the gradient of its output.

A rule is chosen by the layer's type and never trusted for that alone: ``probe.py`` compares what it gives with autograd
before it is used. Shapes: B examples, T tokens, O outputs, I inputs, D width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.merging.fisher.squares import Lookups, Products

Contribution = Products | Lookups | torch.Tensor
"""What one call of a layer adds to the gradient of a parameter. A tensor is [B, T, D], to be summed over T."""
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, Contribution]]
"""(layer, input [B, T, ...], gradient of the output [B, T, ...]) → contributions by parameter's name in the layer."""
MAX_SPARE_ROWS = 1024


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for the parameters that belong to ``module`` itself, None where there is none."""
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        is_scaled = type(module).forward is not nn.Embedding.forward
        return (_changed_embedding if is_scaled else _embedding) if plain else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        return None
    for layer_type, rule in RULES.items():
        if isinstance(module, layer_type):
            return rule
    own = dict(module.named_parameters(recurse=False))
    if any(module.children()) or not own or any(p.dim() != 1 for p in own.values()):
        return None
    return _scale if _epsilon(module) is None or own.keys() != {"weight"} else _probably_rms_norm


def _linear(module: nn.Module, input_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> dict[str, Contribution]:
    return {"weight": Products(grad_BTO, input_BTI), "bias": grad_BTO}


def _transposed_linear(
    module: nn.Module, input_BTI: torch.Tensor, grad_BTO: torch.Tensor
) -> dict[str, Contribution]:
    """transformers' Conv1D holds its weight as [I, O]."""
    return {"weight": Products(input_BTI, grad_BTO, is_transposed=True), "bias": grad_BTO}


def _embedding(module: nn.Module, ids_BT: torch.Tensor, grad_BTD: torch.Tensor) -> dict[str, Contribution]:
    assert isinstance(module, nn.Embedding)
    ids_BS = ids_BT.reshape(len(grad_BTD), -1)
    if module.padding_idx is not None:
        ids_BS = ids_BS.masked_fill(ids_BS == module.padding_idx, -1)
    return {"weight": Lookups(ids_BS, grad_BTD)}


def _changed_embedding(
    module: nn.Module, ids_BT: torch.Tensor, grad_BTD: torch.Tensor
) -> dict[str, Contribution]:
    """A subclass that does something to the rows it has looked up (Gemma scales them).

    Each lookup gets a copy of its row of its own, and autograd differentiates by the copies.
    """
    assert isinstance(module, nn.Embedding)
    # Row padding_idx has no gradient: the copies stand behind it.
    num_spare = 0 if module.padding_idx is None else module.padding_idx + 1
    if num_spare > MAX_SPARE_ROWS:
        return {}
    rows = module.weight.detach()[torch.cat([ids_BT.new_zeros(num_spare), ids_BT.flatten()])]
    own_ids = torch.arange(ids_BT.numel(), device=ids_BT.device).view_as(ids_BT) + num_spare
    with torch.enable_grad():
        rows.requires_grad_()
        output = torch.func.functional_call(module, {"weight": rows}, (own_ids,))
        (grad_rows,) = torch.autograd.grad(output, rows, grad_BTD)
    return _embedding(module, ids_BT, grad_rows[num_spare:].view_as(grad_BTD))


def _layer_norm(
    module: nn.Module, input_BTD: torch.Tensor, grad_BTD: torch.Tensor
) -> dict[str, Contribution]:
    assert isinstance(module, nn.LayerNorm)
    normalised = nn.functional.layer_norm(input_BTD.float(), module.normalized_shape, eps=module.eps)
    return {"weight": normalised.mul_(grad_BTD), "bias": grad_BTD}


def _rms_norm(module: nn.Module, input_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> dict[str, Contribution]:
    assert isinstance(module, nn.RMSNorm)
    normalised = nn.functional.rms_norm(input_BTD.float(), module.normalized_shape, eps=module.eps)
    return {"weight": normalised.mul_(grad_BTD)}


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _probably_rms_norm(
    module: nn.Module, input_BTD: torch.Tensor, grad_BTD: torch.Tensor
) -> dict[str, Contribution]:
    """The RMS norms of transformers' models, which have no class in common: x̂ · weight or x̂ · (1 + weight)."""
    normalised = nn.functional.rms_norm(input_BTD.float(), input_BTD.shape[-1:], eps=_epsilon(module))
    return {"weight": normalised.mul_(grad_BTD)}


def _scale(module: nn.Module, input_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> dict[str, Contribution]:
    """Any layer that multiplies or shifts its last dimension by vectors.

    Each example gets a copy of the vectors of its own (a broadcast one), and autograd differentiates by the copies.
    """
    own: Mapping[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    with torch.enable_grad():
        copies = {
            name: p.detach()[None, None].expand(len(input_BTD), 1, -1).requires_grad_()
            for name, p in own.items()
        }
        output = torch.func.functional_call(module, copies, (input_BTD,))
        gradients = torch.autograd.grad(
            output, list(copies.values()), grad_BTD, allow_unused=True, materialize_grads=True
        )
    return dict(zip(own, gradients, strict=True))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _transposed_linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
}
SECOND_CHOICE: dict[Rule, Rule] = {_probably_rms_norm: _scale}
"""What is tried where the first rule turns out to be wrong: slower, and right more often."""
