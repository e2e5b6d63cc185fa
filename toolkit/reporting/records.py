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
MergeStatus = Literal["merged", "skipped", "failed"]
GateVerdict = Literal["accepted", "rejected"]
Verdict = Literal["helped", "hurt", "no difference"]
AlertKind = Literal[
    "non_finite_loss", "loss_explosion", "accuracy_collapse", "memory", "participant_failed", "merge_failed"
]


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
class MergeRecord:
    """One merge: made, left out although it was due, or failed after its last attempt.

    A record of a round that was handled already (after a resume) takes the place of the earlier one.
    """

    round: int
    epoch: int
    """Passes over the data that every participant has done, as a whole number."""
    steps: Mapping[str, int]
    """Optimizer steps of each participant at the merge: its place on the time axis."""
    participants: list[str]
    """Those whose states went in."""
    method: str
    status: MergeStatus
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The weights really used: target to source to weight.

    Where every participant gets its own mixture the targets are participants; where all get one model there is one
    target, the target languages joined by commas.
    """
    reason: str
    """Why the schedule merged (or did not), as a sentence."""
    trigger: str
    """``frequency``, ``adaptive``, ``performance``, ``convergence``, ``none``."""
    confidence: float
    decision_metrics: Mapping[str, float] = field(default_factory=dict)
    """The numbers that the schedule decided by."""
    gate: Mapping[str, GateVerdict | None] = field(default_factory=dict)
    """Every participant that was offered a merged state, to the verdict of the gate; None: no gate, it took it."""
    before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Participant to the metrics on its held-out rows before the merge."""
    after: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same of the merged state, whether or not the gate let it pass."""
    seconds: float
    """Of the merge itself, without the evaluations."""
    attempts: int
    path: str | None = None
    """Folder of the merged model, where one was written."""
    error: str | None = None
    """What a merge failed of, or why it was left out."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """A round is over: every active participant trained one epoch, and a merge was made or not."""

    round: int
    epoch: int
    num_epochs: int
    """Of the whole run, where nobody stops early."""
    steps: Mapping[str, int]
    """Optimizer steps of each participant that finished the round."""
    active: list[str]
    """Those that train on."""
    stopped: Mapping[str, str] = field(default_factory=dict)
    """Participant that stopped early to the reason; it keeps its weights."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Participant that failed and was left out to the error."""
    seconds: float
    """Of the whole round."""
    decision: Mapping[str, Any] | None = None
    """The schedule's decision as JSON values (``should_merge``, ``reason``, ``recommended_frequency``, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertRecord:
    """Something that a person should look at. The run goes on."""

    kind: AlertKind
    participant: str | None
    """None: the whole run."""
    step: int | None
    message: str
    """A sentence with the participant, its step and the numbers."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The numbers that it was raised by, thresholds included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRecord:
    """Whether it helped: each participant's metric under every arm on the same rows."""

    columns: list[str]
    """Headings of ``rows``: the participant, the arms, the interval, the verdict."""
    rows: list[list[str]]
    """The table as it is printed; the first cell names the participant, in the order of ``verdicts``."""
    verdicts: Mapping[str, Verdict]
    comparison: Mapping[str, Any]
    """The figures behind it (JSON values), as they stand in final_statistics.json."""
    notes: list[str] = field(default_factory=list)
    """Sentences below the table: what was compared, seeds, interval."""


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


Record = (
    RunStart
    | StepRecord
    | EvaluationRecord
    | SampleRecord
    | CheckpointRecord
    | MergeRecord
    | RoundRecord
    | AlertRecord
    | ComparisonRecord
    | MessageRecord
    | RunEnd
)
