"""Log-likelihoods of single examples, and the labels that the two kinds of Fisher information take.

Shapes: B examples, T tokens, C classes or V vocabulary entries.

The log-likelihood of an example is log p(y | x) for a classifier, and for a language model the **sum** over its trained
tokens, Σ_t log p(y_t | y_<t): the likelihood of the whole text. (With the mean, long texts would count less than the
parameters know about them, and the result would not be the Fisher information of any distribution.)
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from toolkit.data.columns import IGNORED
from toolkit.errors import ModelError

Task = Literal["causal-lm", "sequence-classification"]
Kind = Literal["empirical", "true"]
NORMALISATION = (
    "mean over examples of squared gradients of log p(example); language models: sum over trained tokens"
)
MAX_EXACT_CLASSES = 8
"""The exact expectation takes one backward pass a class."""
SAMPLED_ROWS = 64
"""Rows of logits that are turned into float64 distributions at a time."""


@dataclass(frozen=True, slots=True)
class Target:
    """Labels to differentiate the log-likelihood of, and the factor of each example's gradient.

    Attributes:
        labels: int64 [B], or [B, T] as the model takes them (not shifted, -100 where not trained).
        factor_B: float32; √p(y|x) in an exact expectation, so that the square carries the probability.
    """

    labels: torch.Tensor
    factor_B: torch.Tensor | None = None

    def row(self, example: int, columns: slice) -> "Target":
        """The target of one example alone, its padding cut off."""
        labels = self.labels[example : example + 1]
        factor = None if self.factor_B is None else self.factor_B[example : example + 1]
        return Target(labels[:, columns] if labels.dim() == 2 else labels, factor)


def log_likelihoods(logits: torch.Tensor, target: Target, task: Task) -> torch.Tensor:
    """log p of each example, times its factor: float32 [B].

    Args:
        logits: [B, C] of a classifier, [B, T, V] of a language model.
        target: its labels and factors.
        task: of the model.
    """
    if task == "causal-lm":
        labels_BT = target.labels[:, 1:]
        example_N, token_N = (labels_BT != IGNORED).nonzero(as_tuple=True)
        chosen = logits[example_N, token_N].float()
        values_N = torch.nn.functional.cross_entropy(chosen, labels_BT[example_N, token_N], reduction="none")
        values_B = values_N.new_zeros(len(logits)).index_add(0, example_N, -values_N)
    else:
        values_B = -torch.nn.functional.cross_entropy(logits.float(), target.labels, reduction="none")
    return values_B if target.factor_B is None else values_B * target.factor_B


def draw_targets(
    logits: torch.Tensor, labels: torch.Tensor, *, task: Task, kind: Kind, seed: int, examples: Sequence[str]
) -> list[Target]:
    """The targets whose squared gradients add up to the Fisher information of each example of a batch.

    empirical: the data's labels. true: Σ_y p(y|x) over all classes where they are at most :data:`MAX_EXACT_CLASSES`,
    else one label an example, or token, drawn from the model's own distribution (an unbiased estimate; Martens 2014,
    arXiv:1412.1193, section 9.2). A language model's contexts stay those of the data.

    Args:
        logits: [B, C] or [B, T, V].
        labels: of the data, [B] or [B, T].
        task, kind: of the estimate.
        seed, examples: with the example's name, what its draw depends on; batches do not matter.
    """
    if kind == "empirical":
        return [Target(labels)]
    logits = logits.detach()
    if task == "causal-lm":
        drawn = labels.clone()
        for row, number in enumerate(examples):
            tokens = (labels[row, 1:] != IGNORED).nonzero().squeeze(1)
            drawn[row, tokens + 1] = _draw(logits[row, tokens], seed, number)
        return [Target(drawn)]
    num_classes = logits.shape[-1]
    if num_classes > MAX_EXACT_CLASSES:
        rows = [_draw(logits[row : row + 1], seed, number) for row, number in enumerate(examples)]
        return [Target(torch.cat(rows))]
    probabilities = logits.float().softmax(dim=-1)
    return [Target(torch.full_like(labels, c), probabilities[:, c].sqrt()) for c in range(num_classes)]


def _draw(logits_NV: torch.Tensor, seed: int, example: str) -> torch.Tensor:
    """One label for each row, from numbers that depend on seed and example only, by inverting the distribution."""
    key = hashlib.sha256(f"{seed}:{example}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") % 2**63)
    uniform_N = torch.rand(len(logits_NV), generator=generator, dtype=torch.float64).to(logits_NV.device)
    drawn = []
    for logits, uniform in zip(logits_NV.split(SAMPLED_ROWS), uniform_N.split(SAMPLED_ROWS), strict=True):
        cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
        # Scaled by the last sum, so that rounding cannot point behind the last class.
        index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        drawn.append(index.squeeze(1).clamp_(max=logits.shape[-1] - 1))
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64, device=logits_NV.device)


def check_outputs(outputs: Mapping[str, object], labels: torch.Tensor, task: Task) -> torch.Tensor:
    """The logits of a forward pass.

    Raises:
        ModelError: they do not fit the task.
    """
    logits = outputs.get("logits")
    wanted = 3 if task == "causal-lm" else 2
    if not isinstance(logits, torch.Tensor) or logits.dim() != wanted:
        raise ModelError(
            f"the model gives no logits of a {task} model", hint="give the task it was trained for"
        )
    if task == "sequence-classification":
        num_classes = logits.shape[-1]
        if num_classes < 2:
            raise ModelError("the model has a single output: Fisher information of a regression is not built")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ModelError(f"the data has class {int(labels.max())}, the model has {num_classes} classes")
    return logits
