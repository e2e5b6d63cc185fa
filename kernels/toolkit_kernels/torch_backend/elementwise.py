"""The rules that write a tensor, on one chunk: each returns the result in float64, in the thread's scratch.

Legend: C elements of a chunk, K models.
"""

import functools
import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from toolkit_kernels.rules import Consensus, FisherMean, NearSwap, Rule, WeightedSum
from toolkit_kernels.torch_backend.masks import kept
from toolkit_kernels.torch_backend.memory import Chunk, scratch


def num_rows(rule: Rule, num_models: int) -> int:
    """Rows of float64 scratch that a rule needs, to choose the size of its chunks."""
    return num_models + 5 if isinstance(rule, Consensus) else 4


def compute(rule: Rule, chunk: Chunk) -> Tensor:
    """[C] float64 of the rule's formula."""
    if isinstance(rule, WeightedSum):
        return weighted_sum(rule, chunk)
    if isinstance(rule, FisherMean):
        return fisher_mean(rule, chunk)
    if isinstance(rule, Consensus):
        return consensus(rule, chunk)
    return near_swap(rule, chunk)


def store(result_C: Tensor, out_C: Tensor) -> None:
    """Round to float32 and from there to the dtype of ``out_C``."""
    if out_C.dtype in (torch.float16, torch.bfloat16):
        (float32_C,) = scratch.rows(1, len(result_C), result_C.device, torch.float32)
        result_C = float32_C.copy_(result_C)
    out_C.copy_(result_C)


def weighted_sum(rule: WeightedSum, chunk: Chunk) -> Tensor:
    total_C, term_C = scratch.rows(2, chunk.size, chunk.device)
    terms = list(zip(rule.weights.tolist(), chunk.theta, strict=True))
    if rule.base_weight is not None:
        terms.insert(0, (rule.base_weight, _needed(chunk.base)))
    return _weighted_sum(terms, total_C, term_C)


def _weighted_sum(terms: Iterable[tuple[float, Tensor]], total_C: Tensor, term_C: Tensor) -> Tensor:
    (weight, theta_C), *rest = terms
    total_C.copy_(theta_C).mul_(weight)
    for weight, theta_C in rest:
        total_C.add_(term_C.copy_(theta_C).mul_(weight))
    return total_C


def fisher_mean(rule: FisherMean, chunk: Chunk) -> Tensor:
    numerator_C, denominator_C, weighted_C, term_C = scratch.rows(4, chunk.size, chunk.device)
    settings = zip(rule.weights.tolist(), rule.floors.tolist(), strict=True)
    models = zip(settings, chunk.fisher, chunk.theta, strict=True)
    for number, ((weight, floor), fisher_C, theta_C) in enumerate(models):
        if number == 0:
            denominator_C.copy_(fisher_C).clamp_(min=floor).mul_(weight)
            numerator_C.copy_(theta_C).mul_(denominator_C)
        else:
            denominator_C.add_(weighted_C.copy_(fisher_C).clamp_(min=floor).mul_(weight))
            numerator_C.add_(term_C.copy_(theta_C).mul_(weighted_C))
    numerator_C.div_(denominator_C)
    if int(torch.count_nonzero(denominator_C)) < chunk.size:
        (zero_C,) = scratch.rows(1, chunk.size, chunk.device, torch.bool)
        torch.eq(denominator_C, 0, out=zero_C)
        plain = zip(rule.fallback.tolist(), chunk.theta, strict=True)
        fallback_C = _weighted_sum(plain, weighted_C, term_C)
        torch.where(zero_C, fallback_C, numerator_C, out=numerator_C)
    return numerator_C


def consensus(rule: Consensus, chunk: Chunk) -> Tensor:
    rows = scratch.rows(num_rows(rule, len(chunk.theta)), chunk.size, chunk.device)
    base_C, total_C, divisor_C, sign_C, term_C, *v_KC = rows
    weights = rule.weights.tolist()
    base_C.copy_(_needed(chunk.base))
    total_C.zero_()
    for v_C, weight, keep, theta_C in zip(v_KC, weights, rule.keep, chunk.theta, strict=True):
        v_C.copy_(theta_C).sub_(base_C)
        kept_C = kept(keep, v_C, chunk.start)
        v_C.mul_(keep.rescale).mul_(weight)
        if kept_C is not None:
            v_C.view(torch.int64).bitwise_and_(kept_C)
        total_C.add_(v_C)
    if rule.elect:
        _elect(weights, v_KC, total_C, divisor_C, sign_C, term_C)
    else:
        divisor_C.fill_(functools.reduce(operator.add, weights, 0.0))  # sum() compensates for rounding
    if rule.normalize:
        (zero_C,) = scratch.rows(1, chunk.size, chunk.device, torch.bool)
        torch.le(torch.abs(divisor_C, out=term_C), rule.negligible, out=zero_C)
        total_C.div_(divisor_C.masked_fill_(zero_C, 1.0))
    return total_C.mul_(rule.scale).add_(base_C)


def _elect(
    weights: list[float],
    v_KC: list[Tensor],
    total_C: Tensor,
    divisor_C: Tensor,
    sign_C: Tensor,
    term_C: Tensor,
) -> None:
    """Replace the total by the sum of the v_k that have its sign, and set the divisor to the sum of their weights.

    What has the other sign is clamped to zero, and so is NaN, which has none; a sum from +0.0 on takes no notice.
    """
    (positive_C,) = scratch.rows(1, len(total_C), total_C.device, torch.bool)
    sign_C.copy_(torch.ge(total_C, 0, out=positive_C)).mul_(2).sub_(1)
    total_C.zero_()
    divisor_C.zero_()
    for weight, v_C in zip(weights, v_KC, strict=True):
        torch.mul(v_C, sign_C, out=term_C)
        term_C.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).clamp_(min=0.0)
        total_C.add_(torch.mul(term_C, sign_C, out=v_C))
        divisor_C.add_(term_C.sign_().mul_(weight))


def near_swap(rule: NearSwap, chunk: Chunk) -> Tensor:
    base_C, delta_C, size_C, weight_C = scratch.rows(4, chunk.size, chunk.device)
    (equal_C,) = scratch.rows(1, chunk.size, chunk.device, torch.bool)
    (theta_C,) = chunk.theta
    base_C.copy_(_needed(chunk.base))
    delta_C.copy_(theta_C).sub_(base_C)
    weight_C.fill_(rule.t).div_(torch.abs(delta_C, out=size_C)).clamp_(max=1.0)
    torch.eq(delta_C, 0, out=equal_C)
    return weight_C.masked_fill_(equal_C, 1.0).mul_(delta_C).add_(base_C)


def _needed(base_C: Tensor | None) -> Tensor:
    if base_C is None:
        raise ValueError("this rule needs a base")
    return base_C
