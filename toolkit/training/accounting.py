"""Counts what a Trainer really trained on: tokens, trained tokens, losses, order of the rows.

TRL's own token count restarts from zero when a run is resumed. Here the counters are part of the checkpoint.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from toolkit.errors import NonFiniteLossError
from toolkit.training.contract import StepStatistics

LABEL_IGNORED = -100


@dataclass(slots=True)
class Totals:
    """Counters since the beginning of the run; saved with every checkpoint."""

    tokens: int = 0
    trainable_tokens: int = 0
    digest: int = 0


class Accounting:
    """Collects the statistics of one participant's steps.

    Args:
        name: the participant.
        on_step: receives every step, on every process.
        stop_requested: whether this process wants the run to pause.
        gather: [n] int64 on each process → [processes, n], in the order of the ranks.
    """

    def __init__(
        self,
        *,
        name: str,
        on_step: Callable[[StepStatistics], None],
        stop_requested: Callable[[], bool],
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.name = name
        self.totals = Totals()
        self.stop_agreed = False
        self._on_step = on_step
        self._stop_requested = stop_requested
        self._gather = gather
        self._tokens = self._trainable_tokens = self._digest = 0
        self._step_began = 0.0

    def begin_step(self, batches: list[dict[str, Any]], label_shift: int) -> None:
        """Count the batches of one optimizer step on this process, before they are trained.

        Args:
            batches: what the collator made: ``input_ids`` [B, T], ``labels`` [B, T] or [B], ``attention_mask`` [B, T]
                unless the rows are packed.
            label_shift: 1 where token t predicts token t + 1 (the first label of a row is never used), else 0.
        """
        self._step_began = time.perf_counter()
        self._tokens = self._trainable_tokens = self._digest = 0
        for batch in batches:
            input_ids, labels = batch["input_ids"], batch["labels"]
            mask = batch.get("attention_mask")
            self._tokens += int(input_ids.numel() if mask is None else mask.sum())
            counted = labels[:, label_shift:] if labels.dim() == 2 else labels
            self._trainable_tokens += int((counted != LABEL_IGNORED).sum())
            self._digest = zlib.crc32(input_ids.detach().cpu().numpy().tobytes(), self._digest)

    def check_loss(self, loss: torch.Tensor, step: int) -> None:
        """Stop before the optimizer applies a loss that is not a number.

        Raises:
            NonFiniteLossError: with what to try, from most to least likely.
        """
        if torch.isfinite(loss):
            return
        raise NonFiniteLossError(
            f"{self.name}: the loss of step {step + 1} is {loss.item()}; the step was not applied",
            hint="lower --learning-rate (half of it first), raise --warmup-ratio to 0.1, keep --max-grad-norm at 1.0, "
            "prefer bf16 to fp16, and look at the rows with `meldkit data preview`",
        )

    def end_step(
        self, *, step: int, epoch: float, loss: float, grad_norm: float | None, learning_rate: float
    ) -> None:
        """Close an optimizer step on all processes (one small gather) and report it."""
        seconds = time.perf_counter() - self._step_began
        stop = int(self._stop_requested())
        counts = self._gather(
            torch.tensor([self._tokens, self._trainable_tokens, self._digest, stop])
        ).tolist()
        totals = self.totals
        num_tokens, num_trainable_tokens = sum(row[0] for row in counts), sum(row[1] for row in counts)
        totals.tokens += num_tokens
        totals.trainable_tokens += num_trainable_tokens
        for row in counts:
            totals.digest = zlib.crc32(row[2].to_bytes(8, "little"), totals.digest)
        self.stop_agreed = self.stop_agreed or any(row[3] for row in counts)
        self._on_step(
            StepStatistics(
                step=step,
                epoch=epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                num_tokens=num_tokens,
                num_trainable_tokens=num_trainable_tokens,
                total_tokens=totals.tokens,
                total_trainable_tokens=totals.trainable_tokens,
                step_seconds=seconds,
                batch_digest=f"{totals.digest:08x}",
            )
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.totals)

    def load(self, values: dict[str, Any]) -> None:
        self.totals = Totals(**values)
