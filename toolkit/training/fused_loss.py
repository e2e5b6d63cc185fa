"""The loss of a language model straight from the last hidden states: no logits of the whole batch, no second pass.

A model's own loss keeps logits [N, V] for the backward pass, or computes them again there. Here the gradient of the
hidden states is computed while a few rows of logits are at hand, which are then forgotten. Tokens without a label cost
nothing.

N labelled tokens, H hidden size, V vocabulary. Source of the idea: P. Hsu et al., Liger Kernel (2024),
arXiv:2410.10989, section 3.2.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from toolkit.data.columns import IGNORED

ROWS_AT_A_TIME = 256
"""Tokens whose logits exist at a time: 50 MB at 49,152 tokens of vocabulary. Fewer make small matrix products."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of ``hidden @ weight.T`` and ``targets``.

    Args:
        hidden: [N, H], of any floating-point type; products are computed in it, the softmax in float32.
        weight: [V, H], of the same type.
        targets: [N] int64, token ids.

    Returns:
        [] float32: sum of logsumexp(z_n) - z_n[target_n]. Its gradient with respect to z is softmax(z) - onehot.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for begin in range(0, len(hidden), ROWS_AT_A_TIME):
            rows, labels = (
                hidden[begin : begin + ROWS_AT_A_TIME],
                targets[begin : begin + ROWS_AT_A_TIME, None],
            )
            log_p = torch.log_softmax(rows @ weight.t(), dim=-1, dtype=torch.float32)
            loss -= log_p.gather(1, labels).sum()
            if hidden_gradient is None and weight_gradient is None:
                continue
            gradient = log_p.exp_().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
            gradient = gradient.to(hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[begin : begin + ROWS_AT_A_TIME])
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ rows
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * upstream[0]
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * upstream[0]).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None


def head_of(model: Any) -> torch.nn.Linear | None:
    """The model's head where it is a matrix product and nothing more: no adapter on it, no bias, not quantized."""
    head = plain(model).get_output_embeddings()
    is_plain = type(head) is torch.nn.Linear and head.bias is None and head.weight.is_floating_point()
    return head if is_plain else None


def plain(model: Any) -> Any:
    """transformers' model, under an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def fused_loss(model: Any, inputs: Mapping[str, Any], num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross-entropy of the next tokens, summed and divided by ``num_items``.

    Args:
        model: a causal language model or a PEFT model of one, with a plain head (:func:`head_of`).
        inputs: of its decoder, and ``labels`` [B, T].
        num_items: labelled tokens of the whole optimizer step; None for those of this batch.
    """
    head = head_of(model)
    assert head is not None
    labels = inputs["labels"][:, 1:]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = plain(model).get_decoder()(**rest, use_cache=False).last_hidden_state[:, :-1]
    labelled = labels != IGNORED
    hidden, targets = hidden[labelled], labels[labelled]
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # as the head itself would compute
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    loss = LinearCrossEntropy.apply(hidden, head.weight.to(hidden.dtype), targets)
    return loss / (len(targets) if num_items is None else num_items)
