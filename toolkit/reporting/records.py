"""What a run tells the outside: plain records, made by the loop and handled by listeners.

All records are frozen, hold no tensors, and carry units in their names. ``participant`` is the participant's
name ("model" or the like when there is only one). A loss may be NaN or infinite: every listener can write
that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["before", "during", "after"]
Level = Literal["debug", "info", "warning", "error"]
Status = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """The run begins (or continues). Handled once, before any other record."""

    recipe: str
    """Name of the recipe, e.g. ``centralized-hf``."""
    title: str
    """Heading of the report, e.g. the run's name."""
    rows: list[tuple[str, str]]
    """The configuration as it is printed: label and value, e.g. ``("Batch size", "1")``."""
    num_steps: int
    """Optimizer steps that each participant makes over the whole run."""
    participants: list[str]
    """Names, in the order in which they are shown."""
    num_epochs: float | None = None
    """Passes over the data; None: worked out from the steps."""
    data_check: Mapping[str, Any] | None = None
    """Summary of the data check (JSON values), shown in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step of one participant, after the update."""

    participant: str
    step: int
    """1 for the first step of the run; goes on counting after a resume."""
    epoch: float
    """Passes over the data that are done, e.g. 1.25."""
    num_steps: int
    """Steps of the whole run."""
    loss: float
    """Training loss of this step, the mean over its trained tokens (nats) or rows."""
    learning_rate: float
    grad_norm: float | None
    """Norm of the gradient before clipping."""
    num_tokens: int
    """Tokens of this step without padding, over all processes and accumulated batches."""
    num_trainable_tokens: int
    """Those of them that the loss looks at."""
    total_tokens: int
    """Sum of ``num_tokens`` since the run began."""
    total_trainable_tokens: int
    step_seconds: float
    tokens_per_second: float
    memory_bytes: int
    """Memory of the run at its peak: of the GPU's allocator where there is one, else of the process."""
    gpu: Mapping[str, float] | None = None
    """``utilization_percent``, ``power_watts``, ``memory_used_bytes``: see resources.gpu_of_run."""
    batch_digest: str = ""
    """CRC-32 over the token ids since the run began: equal digests mean the same rows in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """Metrics on held-out rows."""

    participant: str
    step: int
    epoch: float
    phase: Phase
    """Before training, between two steps, or after the last one."""
    metrics: Mapping[str, float]
    """Metric name to value, with or without the prefix ``eval_``."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """The model's answer to one sample prompt, before or after training."""

    participant: str
    phase: Phase
    prompt: str
    answer: str
    reference: str | None = None
    """The right answer, where one is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint was committed."""

    participant: str
    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRecord:
    """A sentence for the user."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """The run is over. Handled once, last."""

    status: Status
    summary: list[tuple[str, str]] = field(default_factory=list)
    """What is printed as the summary: label and value."""
    paths: list[tuple[str, str]] = field(default_factory=list)
    """Files and folders for the user: label and path, e.g. ``("Model saved to", "out/final_model")``."""
    error: str | None = None
    """What ended the run, when it is not done."""


Record = RunStart | StepRecord | EvaluationRecord | SampleRecord | CheckpointRecord | MessageRecord | RunEnd
