"""Metrics on held-out rows that do not depend on batch size, padding or the number of processes.

transformers' own evaluation averages the losses of batches, so its number moves with the batch size, and its data
loader draws from the global random number generator, so evaluating changes the training that follows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from toolkit.data.columns import IGNORED
from toolkit.evaluation.classification import accuracy_and_f1


@torch.no_grad()
def evaluate_held_out(
    model: torch.nn.Module,
    rows: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    *,
    task: str,
    batch_size: int,
    accelerator: Any,
    accepts_num_items: bool = True,
) -> dict[str, float]:
    """Evaluate ``model`` on ``rows``, spread over the processes.

    Args:
        model: the module to call; with DeepSpeed its engine.
        rows: prepared rows (``input_ids``, ``labels``), the same on every process.
        collator: list of rows → batch.
        task: ``causal-lm`` or ``sequence-classification``.
        batch_size: rows a batch on each process.
        accelerator: of the trainer; reduces the sums over the processes.
        accepts_num_items: whether a language model's forward takes ``num_items_in_batch``, the divisor of its loss.

    Returns:
        For a language model ``loss``: mean negative log likelihood in nats over all trained tokens, ``perplexity`` and
        ``num_tokens``. For a classifier ``loss`` (mean over rows), ``accuracy`` and ``f1`` (macro mean over the labels
        that occur).
    """
    was_training = model.training
    model.eval()
    try:
        if task == "causal-lm":
            return _language_model(model, rows, collator, batch_size, accelerator, accepts_num_items)
        return _classifier(model, rows, collator, batch_size, accelerator)
    finally:
        model.train(was_training)


def _batches(rows: Any, batch_size: int, accelerator: Any):
    """Row numbers of this process, batch by batch; each process has the same number of batches, some perhaps empty."""
    rank, world = accelerator.process_index, accelerator.num_processes
    own = list(range(rank, len(rows), world))
    for start in range(0, math.ceil(len(rows) / world), batch_size):
        yield own[start : start + batch_size]


def _language_model(
    model: Any, rows: Any, collator: Any, batch_size: int, accelerator: Any, accepts_num_items: bool
) -> dict[str, float]:
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for numbers in _batches(rows, batch_size, accelerator):
        batch = collator([rows[i] for i in numbers] or [rows[0]])
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        if (
            not numbers
        ):  # ZeRO-3 gathers weights in the forward pass: all processes must make it equally often
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        if accepts_num_items:  # divided by one item, the model's mean over tokens is their sum
            loss_sum = model(**batch, num_items_in_batch=torch.ones_like(num_tokens), use_cache=False).loss
        else:
            loss_sum = model(**batch, use_cache=False).loss * num_tokens if num_tokens else num_tokens
        total[0] += loss_sum.double()
        total[1] += num_tokens
    loss_sum, num_tokens = accelerator.reduce(total, reduction="sum").tolist()
    loss = loss_sum / max(num_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": num_tokens}


def _classifier(model: Any, rows: Any, collator: Any, batch_size: int, accelerator: Any) -> dict[str, float]:
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    predicted: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    num_labels = 0
    for numbers in _batches(rows, batch_size, accelerator):
        batch = collator([rows[i] for i in numbers] or [rows[0]])
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        num_labels = logits.shape[-1]
        if not numbers:
            continue
        loss_sum += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        predicted.append(logits.argmax(dim=-1))
        expected.append(labels)
    confusion = torch.zeros(num_labels, num_labels, dtype=torch.float64, device=accelerator.device)
    if expected:
        pairs = torch.cat(expected) * num_labels + torch.cat(predicted)
        confusion += torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels).double()
    confusion = accelerator.reduce(confusion, reduction="sum")
    loss = (accelerator.reduce(loss_sum, reduction="sum") / confusion.sum().clamp(min=1)).item()
    return {"loss": loss, **accuracy_and_f1(confusion)}
