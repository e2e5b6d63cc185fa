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
NOISE_UNITS = 32
"""Units in the last place of the largest gradient. A gradient below is rounding only (that of a key's bias is zero)."""


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
        wide = gradient.float().abs()
        norms[name] = wide.norm().item()
        # A call whose gradient has not arrived (an output that nothing used) may leave a contribution waiting.
        recorder.add_waiting(name)
        differences[name] = (fisher[name].sqrt() - wide).norm().item()
        parameter.grad = None

    with differentiated_by(model, parameters.values()):
        handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p))
            for name, p in parameters.items()
        ]
        try:
            recorder.begin(len(pair), pair.num_tokens)
            first_log_likelihood(pair).backward()
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
