"""Counts what a Trainer really trained on: tokens, trained tokens, losses, order of the rows.

TRL's own token count restarts from zero when a run is resumed. Here the counters are part of the checkpoint.
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from toolkit.data.columns import IGNORED
from toolkit.errors import NonFiniteLossError
from toolkit.training.contract import StepStatistics


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
        self._num_tokens = self._num_trainable_tokens = 0
        self._finite: torch.Tensor | None = None
        self._step_began = 0.0

    def begin_step(self, batches: list[dict[str, Any]], label_shift: int) -> None:
        """Count the batches of one optimizer step on this process, before they are trained.

        Args:
            batches: what the collator made: ``input_ids`` [B, T], ``labels`` [B, T] or [B], ``attention_mask`` [B, T]
                unless the rows are packed.
            label_shift: 1 where token t predicts token t + 1 (the first label of a row is never used), else 0.
        """
        self.restart_clock()
        self._finite = None
        self._tokens = self._trainable_tokens = self._digest = 0
        for batch in batches:
            input_ids, labels = batch["input_ids"], batch["labels"]
            mask = batch.get("attention_mask")
            self._tokens += int(input_ids.numel() if mask is None else mask.sum())
            counted = labels[:, label_shift:] if labels.dim() == 2 else labels
            self._trainable_tokens += int((counted != IGNORED).sum())
            ids = (
                input_ids.flatten() if mask is None else input_ids[mask.bool()]
            )  # the same rows, padded or not
            self._digest = zlib.crc32(ids.detach().cpu().numpy().tobytes(), self._digest)

    def restart_clock(self) -> None:
        """The step begins now: its batches were drawn before a pause that is no part of it."""
        self._step_began = time.perf_counter()

    def add_loss(self, loss: torch.Tensor) -> None:
        """Remember whether the loss of a batch is a number; looked at once a step, on all processes."""
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite

    def agree(self, step: int, grad_norm: float | None, *, may_skip_step: bool) -> None:
        """Bring the processes together (one small gather), after the backward pass and before the optimizer.

        Args:
            step: optimizer steps done before this one.
            grad_norm: before clipping, where it is known.
            may_skip_step: fp16: a gradient that overflows makes the scaler skip the step and lower its scale.

        Raises:
            NonFiniteLossError: on all processes, where the loss of one, or the gradient, is not a number.
        """
        loss_ok = self._finite is None or bool(self._finite)
        stop = int(self._stop_requested())
        row = torch.tensor([self._tokens, self._trainable_tokens, self._digest, stop, int(loss_ok)])
        rows = self._gather(row).tolist()
        self._num_tokens, self._num_trainable_tokens = sum(r[0] for r in rows), sum(r[1] for r in rows)
        for r in rows:
            self.totals.digest = zlib.crc32(r[2].to_bytes(8, "little"), self.totals.digest)
        self.stop_agreed = self.stop_agreed or any(r[3] for r in rows)
        gradient_ok = grad_norm is None or math.isfinite(grad_norm) or may_skip_step
        if gradient_ok and all(r[4] for r in rows):
            return
        what = "gradient" if all(r[4] for r in rows) else "loss"
        raise NonFiniteLossError(
            f"{self.name}: the {what} of step {step + 1} is not a finite number (NaN or infinity)",
            hint="lower --learning-rate (half of it first), raise --warmup-ratio to 0.1, keep --max-grad-norm at 1.0, "
            "prefer bf16 to fp16, and look at the rows with `meldkit data preview`",
        )

    def end_step(
        self, *, step: int, epoch: float, loss: float, grad_norm: float | None, learning_rate: float
    ) -> None:
        """Report an optimizer step after it was applied."""
        totals = self.totals
        totals.tokens += self._num_tokens
        totals.trainable_tokens += self._num_trainable_tokens
        self._on_step(
            StepStatistics(
                step=step,
                epoch=epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                num_tokens=self._num_tokens,
                num_trainable_tokens=self._num_trainable_tokens,
                total_tokens=totals.tokens,
                total_trainable_tokens=totals.trainable_tokens,
                step_seconds=time.perf_counter() - self._step_began,
                batch_digest=f"{totals.digest:08x}",
            )
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.totals)

    def load(self, values: dict[str, Any]) -> None:
        self.totals = Totals(**values)
