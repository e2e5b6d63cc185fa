"""Outcomes on held-out rows that do not depend on batch size, padding or the number of processes.

transformers' own evaluation averages the losses of batches, so its number moves with the batch size, and its data
loader draws from the global random number generator, so evaluating changes the training that follows.

Shapes: B rows of a batch, T tokens, P positions whose logits are needed, V vocabulary entries, C classes.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from toolkit.data.columns import IGNORED
from toolkit.evaluation.outcomes import RowOutcomes

LOGITS_BYTES = 256 * 2**20
"""Of one forward pass of a language model: longer rows or larger vocabularies get smaller batches."""
TOKENS_AT_A_TIME = 256
"""Whose logits are turned into float32 together."""

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@torch.no_grad()
def evaluate_rows(
    model: torch.nn.Module, rows: Any, collator: Collator, *, task: str, batch_size: int, accelerator: Any
) -> RowOutcomes:
    """Evaluate ``model`` on ``rows``, spread over the processes.

    Args:
        model: the module to call; with DeepSpeed its engine.
        rows: prepared rows (``input_ids``, ``labels``, ``length``), the same on every process.
        collator: list of rows → batch.
        task: ``causal-lm`` or ``sequence-classification``.
        batch_size: rows a batch on each process, at most.
        accelerator: of the trainer; puts the processes' parts together.

    Returns:
        The outcome of each row, in their order, on every process.
    """
    was_training = model.training
    model.eval()
    try:
        if task == "causal-lm":
            found = _language_model(model, rows, collator, batch_size, accelerator)
        else:
            found = _classifier(model, rows, collator, batch_size, accelerator)
    finally:
        model.train(was_training)
    # Each process has filled in its own rows; the others' are zero.
    columns = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu().numpy()
    if task == "causal-lm":
        return RowOutcomes(loss=columns[0], weight=columns[1])
    return RowOutcomes(
        loss=columns[0],
        weight=np.ones(len(rows)),
        expected=columns[1].astype(np.int64),
        predicted=columns[2].astype(np.int64),
    )


def _batches(
    rows: Any, collator: Collator, batch_size: int, accelerator: Any
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Row numbers and batches of this process.

    Each process has the same number of batches, some perhaps without a number: ZeRO-3 gathers weights in the forward
    pass, so that all processes must make it equally often.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    own = list(range(rank, len(rows), world))
    for start in range(0, math.ceil(len(rows) / world), batch_size):
        numbers = own[start : start + batch_size]
        batch = collator([rows[i] for i in numbers] or [rows[0]])
        yield numbers, {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def _language_model(
    model: Any, rows: Any, collator: Collator, batch_size: int, accelerator: Any
) -> torch.Tensor:
    """float64 [2, rows]: mean loss of this process's rows, and their trained tokens."""
    takes_positions = "logits_to_keep" in inspect.signature(_innermost(model).forward).parameters
    found = torch.zeros(2, len(rows), dtype=torch.float64)
    for numbers, batch in _batches(rows, collator, _rows_in_budget(model, rows, batch_size), accelerator):
        labels_BT = batch.pop("labels")
        row_of_token_BT = _row_of_token(labels_BT, [len(rows[i]["input_ids"]) for i in numbers])
        # Token t is predicted at t - 1, and the first of a row by nothing, also where rows lie in one sequence.
        counted_BP = (labels_BT[:, 1:] != IGNORED) & (row_of_token_BT[:, 1:] == row_of_token_BT[:, :-1])
        positions_P = counted_BP.any(dim=0).nonzero().squeeze(1)
        keep = {"logits_to_keep": positions_P} if takes_positions else {}
        logits_BPV = model(**batch, **keep, use_cache=False).logits
        if not takes_positions:
            logits_BPV = logits_BPV[:, positions_P]
        sequence, place = counted_BP[:, positions_P].nonzero(as_tuple=True)
        token = positions_P[place] + 1
        losses = _losses(logits_BPV, sequence, place, labels_BT[sequence, token])
        row = row_of_token_BT[sequence, token].cpu()
        if numbers:
            found[0, numbers] = torch.zeros(len(numbers), dtype=torch.float64).index_add(0, row, losses)
            found[1, numbers] = torch.bincount(row, minlength=len(numbers)).double()
    found[0] /= found[1].clamp(min=1)
    return found


def _losses(
    logits_BPV: torch.Tensor, sequence: torch.Tensor, place: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Negative log likelihoods of the tokens at (sequence, place): float64 on the CPU."""
    parts = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(sequence), TOKENS_AT_A_TIME):
        some = slice(start, start + TOKENS_AT_A_TIME)
        logits = logits_BPV[sequence[some], place[some]].float()
        parts.append(cross_entropy(logits, expected[some], reduction="none").double().cpu())
    return torch.cat(parts)


def _row_of_token(labels_BT: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """int64 [B, T]: which row of the batch a token belongs to; a collator may have joined them all into one."""
    if len(labels_BT) == len(lengths) or not lengths:
        return torch.arange(len(labels_BT), device=labels_BT.device)[:, None].expand_as(labels_BT)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return numbers.to(labels_BT.device)[None]


def _rows_in_budget(model: Any, rows: Any, batch_size: int) -> int:
    vocabulary = _innermost(model).config.get_text_config().vocab_size
    longest = max(rows["length"], default=1)
    return max(1, min(batch_size, LOGITS_BYTES // (4 * longest * vocabulary)))


def _innermost(model: Any) -> Any:
    """The transformers model inside of DeepSpeed's engine and of PEFT."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _classifier(model: Any, rows: Any, collator: Collator, batch_size: int, accelerator: Any) -> torch.Tensor:
    """float64 [3, rows]: loss, expected and predicted class of this process's rows."""
    found = torch.zeros(3, len(rows), dtype=torch.float64)
    for numbers, batch in _batches(rows, collator, batch_size, accelerator):
        labels = batch.pop("labels")
        logits_BC = model(**batch).logits.float()
        if numbers:
            found[0, numbers] = cross_entropy(logits_BC, labels, reduction="none").double().cpu()
            found[1, numbers] = labels.double().cpu()
            found[2, numbers] = logits_BC.argmax(dim=-1).double().cpu()
    return found
