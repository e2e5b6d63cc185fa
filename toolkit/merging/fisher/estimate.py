"""Diagonal Fisher information of a model's trainable parameters, exact for every single example.

F = (1/n) Σ_b g_b² with g_b = ∇ log p(example b), never the square of a batch's summed gradient, which would contain
the products of different examples. Fisher merging: Matena and Raffel 2021, arXiv:2111.09832.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from toolkit.errors import ModelError
from toolkit.merging.fisher.batches import fingerprint, make_batches
from toolkit.merging.fisher.estimator import BatchEstimator, OnProgress
from toolkit.merging.fisher.frozen import as_function
from toolkit.merging.fisher.likelihood import Kind, Task
from toolkit.merging.fisher.names import file_names
from toolkit.merging.fisher.storage import Fisher


def estimate_fisher(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    task: Task,
    kind: Kind = "empirical",
    num_examples: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Fisher:
    """Estimate the diagonal Fisher information of all parameters of ``model`` that require gradients.

    F = (1/n) Σ_b g_b², g_b = ∇_θ log p(y_b | x_b), or for a language model ∇_θ Σ_t log p(y_bt | y_b,<t) summed over the
    trained tokens of one example. Batch size and order change nothing but rounding. Parameters, modes, flags and
    gradients of the model are afterwards what they were. One float32 buffer of the parameters' size is held,
    whatever the number of examples.

    Args:
        model: a transformers or PEFT model, on any device, float32 or lower.
        data: prepared rows (``input_ids``, ``labels``), or batches that are collated already.
        task: "sequence-classification" or "causal-lm".
        kind: "empirical": labels of the data. "true": exact expectation over at most 8 classes, else labels drawn
            from the model.
        num_examples: of rows, draw so many by ``seed``; of batches, take the first. None: all.
        batch_size: rows a batch.
        seed: of the draw of examples and of labels.
        on_progress: for a progress bar.

    Returns:
        Tensors under the names of the model's (or the adapter's) safetensors file.

    Raises:
        DataError: no example with a label.
        ModelError: nothing to estimate, or a model of another task.
        MergeError: a log-likelihood or a gradient is not finite; the message names the example.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(
            "no parameter of the model requires gradients", hint="unfreeze what is to be estimated"
        )
    pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    batches = make_batches(
        data,
        task=task,
        num_examples=num_examples,
        batch_size=batch_size,
        seed=seed,
        pad_token_id=pad_token_id,
    )
    with as_function(model):
        run = BatchEstimator(model, parameters, batches, task, kind, seed)
        run.add_all(on_progress)
    names = file_names(model, parameters)
    count = sum(map(len, batches))
    return Fisher(
        tensors={names[name]: tensor.div_(count) for name, tensor in run.fisher.items()},
        num_examples=count,
        kind=kind,
        task=task,
        data_fingerprint=fingerprint(batches),
        slow_parameters=tuple(sorted(names[name] for name in run.slow)),
    )
