"""What bench/gpu_kernels.py compares with: torch's own ways to merge a state dict on a GPU, each made the best of.

They accumulate in float32 (our kernels in float64) but for the one that is called after its dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = list[torch.Tensor]
Arm = Callable[[], object]


# --- torch._foreach_*


def foreach_sum_bfloat16(out: Tensors, theta: Sequence[Tensors], weights: Sequence[float]) -> Arm:
    """The fewest bytes that these functions allow; rounds to bfloat16 after each model."""

    def run() -> None:
        torch._foreach_copy_(out, theta[0])
        torch._foreach_mul_(out, weights[0])
        for weight, model in zip(weights[1:], theta[1:], strict=True):
            torch._foreach_add_(out, model, alpha=weight)

    return run


def foreach_sum(out: Tensors, theta: Sequence[Tensors], weights: Sequence[float]) -> Arm:
    total, scratch = float32_like(out), float32_like(out)

    def run() -> None:
        torch._foreach_copy_(total, theta[0])
        torch._foreach_mul_(total, weights[0])
        for weight, model in zip(weights[1:], theta[1:], strict=True):
            torch._foreach_copy_(scratch, model)
            torch._foreach_add_(total, scratch, alpha=weight)
        torch._foreach_copy_(out, total)

    return run


def foreach_fisher(
    out: Tensors, theta: Sequence[Tensors], fisher: Sequence[Tensors], weights: Sequence[float]
) -> Arm:
    numerator, denominator, theta32 = (float32_like(out) for _ in range(3))
    is_float32 = fisher[0][0].dtype == torch.float32
    fisher32 = [] if is_float32 else float32_like(out)

    def run() -> None:
        torch._foreach_zero_(numerator)
        torch._foreach_zero_(denominator)
        for weight, model, information in zip(weights, theta, fisher, strict=True):
            torch._foreach_copy_(theta32, model)
            if not is_float32:
                torch._foreach_copy_(fisher32, information)
            of_model = information if is_float32 else fisher32
            torch._foreach_addcmul_(numerator, theta32, of_model, value=weight)
            torch._foreach_add_(denominator, of_model, alpha=weight)
        torch._foreach_div_(numerator, denominator)
        torch._foreach_copy_(out, numerator)

    return run


def float32_like(tensors: Tensors) -> Tensors:
    return [torch.empty_like(t, dtype=torch.float32) for t in tensors]


# --- torch.compile


def sum_function(weights: Sequence[float]) -> Callable[..., None]:
    """The weighted sum of one tensor; the weights are constants of the graph."""

    def function(out: torch.Tensor, theta: Tensors) -> None:
        total = theta[0].float() * weights[0]
        for weight, values in zip(weights[1:], theta[1:], strict=True):
            total = total + values.float() * weight
        out.copy_(total)

    return function


def fisher_function(weights: Sequence[float]) -> Callable[..., None]:
    def function(out: torch.Tensor, theta: Tensors, fisher: Tensors) -> None:
        weighted = [information.float() * weight for weight, information in zip(weights, fisher, strict=True)]
        numerator = weighted[0] * theta[0].float()
        denominator = weighted[0]
        for weighted_k, values in zip(weighted[1:], theta[1:], strict=True):
            numerator = numerator + weighted_k * values.float()
            denominator = denominator + weighted_k
        out.copy_(numerator / denominator)

    return function


def compiled(function: Callable[..., None], out: Tensors, *inputs: Sequence[Tensors], **options: Any) -> Arm:
    """One graph for the whole dictionary."""

    def whole(out: Tensors, *inputs: Sequence[Tensors]) -> None:
        for i, target in enumerate(out):
            function(target, *([model[i] for model in models] for models in inputs))

    run = torch.compile(whole, fullgraph=True, dynamic=False, **options)
    return lambda: run(out, *inputs)


def compiled_by_tensor(function: Callable[..., None], out: Tensors, *inputs: Sequence[Tensors]) -> Arm:
    """One small graph for each shape, called for each tensor."""
    run = torch.compile(function, fullgraph=True, dynamic=False)

    def every_tensor() -> None:
        for i, target in enumerate(out):
            run(target, *([model[i] for model in models] for models in inputs))

    return every_tensor


def recorded(arm: Arm) -> Arm:
    """The same kernels as a CUDA graph: nothing of Python is left between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            arm()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


def arms_of(
    out: Tensors, theta: Sequence[Tensors], fisher: Sequence[Tensors], weights: Sequence[float]
) -> dict[str, Callable[[], Arm]]:
    """By name, what makes an arm; the weighted sum where there is no Fisher information."""
    foreach: dict[str, Callable[[], Arm]]
    if fisher:
        foreach = {"torch._foreach_*": lambda: foreach_fisher(out, theta, fisher, weights)}
        function, inputs = fisher_function(weights), (theta, fisher)
    else:
        foreach = {
            "torch._foreach_*": lambda: foreach_sum(out, theta, weights),
            "torch._foreach_*, bfloat16": lambda: foreach_sum_bfloat16(out, theta, weights),
        }
        function, inputs = sum_function(weights), (theta,)
    combined = {"combo_kernels": True, "benchmark_combo_kernel": True}
    return foreach | {
        "torch.compile": lambda: compiled(function, out, *inputs),
        "torch.compile, combo kernels": lambda: compiled(function, out, *inputs, options=combined),
        "torch.compile by tensor": lambda: compiled_by_tensor(function, out, *inputs),
        "torch.compile by tensor, CUDA graph": lambda: recorded(compiled_by_tensor(function, out, *inputs)),
    }
