"""Which parameters the hooks get right, decided by trying: one backward pass on a pair of real examples.

Only the first example of the pair has a loss. So the squares of the hooks, G_1² + G_2², equal the square of autograd's
gradient, (G_1 + G_2)², for every element exactly if the examples were told apart and no use of the parameter was
missed (a weight in a formula of its own, experts that see tokens in another order, a layer type that computes
something else). Whatever differs takes the slow path.
"""

from collections.abc import Callable

import torch
from torch import nn

from toolkit.merging.fisher.batches import Batch
from toolkit.merging.fisher.frozen import differentiated_by
from toolkit.merging.fisher.recorder import Recorder

RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2
CHUNK_NUM_ELEMENTS = 1 << 20
NOISE_UNITS = 32
"""Units in the last place of the largest gradient. A gradient below is rounding only (that of a key's bias is zero)."""


def _difference_and_norm(fisher: torch.Tensor, gradient: torch.Tensor) -> tuple[float, float]:
    """‖√F − |g|‖ and ‖g‖, in chunks: the gradient of a large embedding is there once already."""
    squares = torch.zeros(2, dtype=torch.float64, device=gradient.device)
    parts = zip(
        fisher.reshape(-1).split(CHUNK_NUM_ELEMENTS),
        gradient.reshape(-1).split(CHUNK_NUM_ELEMENTS),
        strict=True,
    )
    for fisher_part, gradient_part in parts:
        size = gradient_part.float().abs()
        squares[0] += (fisher_part.sqrt() - size).square_().sum(dtype=torch.float64)
        squares[1] += size.square_().sum(dtype=torch.float64)
    difference, norm = squares.sqrt().tolist()
    return difference, norm


def parameters_to_avoid(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    recorder: Recorder,
    fisher: dict[str, torch.Tensor],
    pair: Batch,
    first_log_likelihood: Callable[[Batch], torch.Tensor],
) -> set[str]:
    """Names of the parameters whose per-example gradients the hooks do not give exactly.

    Args:
        model: in evaluation mode.
        parameters: to estimate.
        recorder: attached.
        fisher: the buffers of ``recorder``; zero before and after.
        pair: two examples.
        first_log_likelihood: forward pass; the log-likelihood of the first row.
    """
    differences: dict[str, float] = {}
    norms: dict[str, float] = {}

    def compare(name: str, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        # A call whose gradient has not arrived (an output that nothing used) may leave a contribution waiting.
        recorder.add_waiting(name)
        differences[name], norms[name] = _difference_and_norm(fisher[name], gradient)
        parameter.grad = None

    with differentiated_by(model, parameters.values()):
        handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p))
            for name, p in parameters.items()
        ]
        try:
            with recorder.watching(len(pair), pair.num_tokens):
                value = first_log_likelihood(pair)
            if value.requires_grad:
                value.backward()
            recorder.finish_backward()
        finally:
            for handle in handles:
                handle.remove()
            for name in parameters:
                fisher[name].zero_()
    largest = max(norms.values(), default=0.0)
    avoid = recorder.without_rule | recorder.failed | (recorder.reached - norms.keys())
    for name, difference in differences.items():
        dtype = parameters[name].dtype
        relative = RELATIVE_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
        floor = NOISE_UNITS * torch.finfo(dtype).eps * largest
        if not difference <= relative * norms[name] + floor:
            avoid.add(name)
    return avoid
