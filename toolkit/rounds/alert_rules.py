"""When a run of several participants deserves a look.

The rules, with the thresholds of :class:`AlertThresholds`:

- *non-finite loss*: a training or held-out loss is NaN or infinite.
- *loss explosion*: the mean of the last 5 training losses is over 2 times the larger of two medians, that of the first
  5 losses of the run and that of the 50 before. A hard batch late in training, where losses are small, is none.
- *accuracy collapse*: accuracy (F1 where there is no accuracy) on held-out rows, after training or of a merged state
  that the participant took, is below half of its best and at least 0.1 below it.
- *memory*: the peak of the run is over 90 % of what there is, of the GPUs or of the container or machine.

Each is raised once, and again only after it was right in between.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from toolkit.reporting import resources
from toolkit.reporting.records import AlertKind, AlertRecord
from toolkit.reporting.wording import number, size

HIGHER_IS_BETTER = ("accuracy", "f1")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertThresholds:
    """When an alert is raised.

    Attributes:
        explosion_factor: a loss counts as exploded over this many times what it was.
        explosion_window_steps: how many steps back "what it was" reaches.
        smoothing_steps: how many losses are averaged first, and how many losses the beginning is.
        collapse_share, collapse_points: held-out accuracy below this share of its best, and so far below it.
        memory_share: of the memory that there is.
    """

    explosion_factor: float = 2.0
    explosion_window_steps: int = 50
    smoothing_steps: int = 5
    collapse_share: float = 0.5
    collapse_points: float = 0.1
    memory_share: float = 0.9


class AlertRules:
    """The rules with what they remember.

    Args:
        thresholds: when an alert is raised.
        emit: is given each alert.
        memory_limit_bytes: memory that there is; None: asked of the system.
    """

    def __init__(
        self,
        thresholds: AlertThresholds,
        emit: Callable[[AlertRecord], None],
        *,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self._thresholds = thresholds
        self._emit = emit
        self._memory_limit_bytes = memory_limit_bytes
        self._losses: dict[str, _Losses] = {}
        self._best: dict[tuple[str, str], float] = {}
        self._wrong: set[tuple[str, ...]] = set()

    def watch_train_loss(self, name: str, step: int, loss: float) -> None:
        values = {"train_loss": loss}
        is_lost = not math.isfinite(loss)
        self._watch(name, step, "non_finite_loss", is_lost, f"the training loss is {loss}", values)
        if is_lost:
            return
        losses = self._losses.setdefault(name, _Losses(self._thresholds))
        mean, usual = losses.add(loss)
        limit = self._thresholds.explosion_factor * usual
        values = {"train_loss": mean, "usual": usual, "threshold": limit}
        text = f"the training loss is {number(mean)} (mean of {self._thresholds.smoothing_steps} steps)"
        self._watch(
            name, step, "loss_explosion", mean > limit, f"{text}, it has been {number(usual)}", values
        )

    def watch_metrics(self, name: str, step: int, metrics: Mapping[str, float], source: str) -> None:
        """Metrics of the weights that a participant has; ``source`` is what made them so."""
        loss = metrics.get("loss", 0.0)
        text = f"the held-out loss is {loss} after {source}"
        self._watch(name, step, "non_finite_loss", not math.isfinite(loss), text, {"eval_loss": loss})
        metric = next((metric for metric in HIGHER_IS_BETTER if metric in metrics), None)
        if metric is None:
            return
        value, best = metrics[metric], self._best.get((name, metric), metrics[metric])
        self._best[name, metric] = max(best, value)
        rules = self._thresholds
        lowest = min(rules.collapse_share * best, best - rules.collapse_points)
        text = f"the held-out {metric} is {number(value)} after {source}, its best was {number(best)}"
        values = {metric: value, "best": best, "threshold": lowest}
        self._watch(name, step, "accuracy_collapse", value < lowest, text, values)

    def watch_memory(self, name: str, step: int, memory_bytes: int) -> None:
        if self._memory_limit_bytes is None:
            self._memory_limit_bytes = resources.memory_limit_bytes()
        limit = self._thresholds.memory_share * self._memory_limit_bytes
        text = (
            f"{name}, step {step}: the run has taken {size(memory_bytes)} of {size(self._memory_limit_bytes)}"
        )
        values = {"memory_bytes": memory_bytes, "limit_bytes": self._memory_limit_bytes, "threshold": limit}
        # Of the whole run, whichever participant was training: a peak never falls.
        if memory_bytes > limit and ("memory",) not in self._wrong:
            self._wrong.add(("memory",))
            self._emit(AlertRecord(kind="memory", participant=name, step=step, message=text, values=values))

    def _watch(
        self,
        name: str,
        step: int,
        kind: AlertKind,
        is_wrong: bool,
        message: str,
        values: Mapping[str, float],
    ) -> None:
        # Training and held-out loss are different numbers under one kind.
        key = (name, kind, *values)
        if is_wrong and key not in self._wrong:
            text = f"{name}, step {step}: {message}"
            self._emit(AlertRecord(kind=kind, participant=name, step=step, message=text, values=dict(values)))
        (self._wrong.add if is_wrong else self._wrong.discard)(key)


class _Losses:
    """The finite training losses of one participant that the rule of explosions looks at."""

    def __init__(self, thresholds: AlertThresholds) -> None:
        self._smoothing_steps = thresholds.smoothing_steps
        self._first: list[float] = []
        self._newest: deque[float] = deque(maxlen=thresholds.smoothing_steps)
        self._before: deque[float] = deque(maxlen=thresholds.explosion_window_steps)

    def add(self, loss: float) -> tuple[float, float]:
        """Mean of the newest losses, and what is usual; the latter is infinite until there are enough losses."""
        if len(self._first) < self._smoothing_steps:
            self._first.append(loss)
            return loss, math.inf
        if len(self._newest) == self._smoothing_steps:
            self._before.append(self._newest[0])
        self._newest.append(loss)
        if len(self._newest) < self._smoothing_steps:
            return loss, math.inf
        usual = [statistics.median(self._first)]
        usual += [statistics.median(self._before)] if self._before else []
        return math.fsum(self._newest) / len(self._newest), max(usual)
