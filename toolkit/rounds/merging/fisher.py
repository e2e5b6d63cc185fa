"""Fisher information of a paused participant."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from toolkit.errors import DataError
from toolkit.merging.fisher import estimate_fisher
from toolkit.training.contract import ParticipantTrainer


def participant_fisher(
    trainer: ParticipantTrainer,
    rows: Sequence[Mapping[str, Any]],
    *,
    num_examples: int,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Diagonal Fisher information of what a participant trains: mean over examples of the squared gradient of one.

    Nothing of the training changes: random number generators, gradients, modes and adapters are put back.

    Args:
        trainer: paused between two calls.
        rows: prepared rows; of a classifier each has one label, of a language model one for each token.
        num_examples: so many are drawn by ``seed``; all where there are fewer.
        batch_size: rows that go through the model together; changes nothing but rounding.
        seed: of the draw.

    Returns:
        float32 tensors >= 0 under names of ``trainer.state()``, on the model's device. Frozen tensors have none.

    Raises:
        DataError: no rows, or no example with a label.
        MergeError: a gradient is not finite; the message names the example.
    """
    if not len(rows):
        raise DataError(f"{trainer.name}: there are no rows to estimate Fisher information from")
    is_one_label = torch.as_tensor(rows[0]["labels"]).dim() == 0
    with trainer.active():
        fisher = estimate_fisher(
            trainer.model,
            rows,
            task="sequence-classification" if is_one_label else "causal-lm",
            num_examples=num_examples,
            batch_size=batch_size,
            seed=seed,
        )
    return fisher.tensors
