"""What every recipe asks of a trainer, and the registry of backends.

A recipe drives participants round by round: build → start → fit → (evaluate, state, merge, load_state, save) → fit …
Between two calls a trainer is paused, not torn down: optimizer, scheduler, scaler, random number generators and data
position stay as they are. Many trainers live side by side on one base; whichever is called is the active one.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from toolkit.errors import InputError
from toolkit.evaluation.outcomes import RowOutcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStatistics:
    """What one optimizer step did, over all processes.

    Attributes:
        step: optimizer steps since the beginning of the run.
        epoch: passes over the data, with a fraction.
        loss: mean over the step's trained tokens (or rows).
        learning_rate: of this step.
        grad_norm: before clipping; None where the backend does not tell.
        num_tokens, num_trainable_tokens: tokens of the step without padding, and those with a label.
        total_tokens, total_trainable_tokens: the same since the beginning of the run.
        step_seconds: from the step's first batch to its end; evaluation and pauses are not in it.
        batch_digest: CRC-32 over the token ids in the order in which they were trained, since the beginning of the
            run: two runs with the same digest saw the same rows in the same order.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    num_tokens: int
    num_trainable_tokens: int
    total_tokens: int
    total_trainable_tokens: int
    step_seconds: float
    batch_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """All that a backend needs to build a participant's trainer.

    Attributes:
        name: the participant.
        model: the base, with the participant's adapter on it where there is one; shared between participants.
        adapter: name of the participant's adapter, None for full fine-tuning.
        tokenizer: of the base.
        train, evaluation: prepared rows (``toolkit.data.prepare``).
        collator: makes a batch of them.
        config: the recipe's options.
        seed: of this participant: order of its rows, dropout.
        world: arguments that the launch plan decides (``toolkit.training.world``).
        staging: folder for checkpoints that are not committed yet.
        on_step: called after every optimizer step on every process.
        stop_requested: asked after every optimizer step; where one process says yes, all pause after that step.
    """

    name: str
    model: Any
    adapter: str | None
    tokenizer: Any
    train: Any
    evaluation: Any | None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    config: Any
    seed: int
    world: Mapping[str, Any]
    staging: Path
    on_step: Callable[[StepStatistics], None]
    stop_requested: Callable[[], bool] = field(default=lambda: False)


class ParticipantTrainer(Protocol):
    """One participant's training, paused between calls."""

    name: str

    @property
    def notes(self) -> Sequence[str]:
        """What the backend does otherwise than it was asked to, a sentence each; a run records them as warnings."""
        ...

    @property
    def throughput_notes(self) -> Sequence[str]:
        """What was chosen to train faster, and why, a sentence each."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps done since the beginning of the run."""
        ...

    @property
    def epoch(self) -> float:
        """Passes over the participant's data, with a fraction."""
        ...

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def num_steps_per_epoch(self) -> int: ...

    @property
    def totals(self) -> dict[str, Any]:
        """Counts since the beginning of the run: ``tokens``, ``trainable_tokens``, ``digest``."""
        ...

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Trained parameters, and all parameters."""
        ...

    @property
    def model(self) -> Any:
        """The model as transformers or PEFT know it, with the participant's adapter active while it trains."""
        ...

    @property
    def accelerator(self) -> Any:
        """accelerate's Accelerator: devices and processes."""
        ...

    def start(self, resume_from: Path | None = None) -> None:
        """Get ready for the first step, from a committed checkpoint if one is given. Once, before anything else.

        Raises:
            CheckpointError: the checkpoint does not belong to this model or this number of processes.
        """
        ...

    def fit(self, until_step: int) -> bool:
        """Train until ``until_step`` steps are done and pause. False when a process asked to stop.

        Raises:
            NonFiniteLossError: the loss or the gradient became NaN or infinite. Without DeepSpeed the step was not
                applied.
        """
        ...

    def evaluate(self, rows: Any = None) -> dict[str, float]:
        """Metrics on prepared rows, without padding or duplicates; nothing of the training changes by it.

        Args:
            rows: None for the participant's own held-out rows; where it has none, there are no metrics.
        """
        ...

    def evaluate_rows(self, rows: Any = None) -> RowOutcomes:
        """What :meth:`evaluate` computes its metrics from: the outcome of every row.

        Raises:
            DataError: no ``rows``, and the participant has none of its own.
        """
        ...

    def active(self) -> AbstractContextManager[None]:
        """The participant's random number generators and adapter in place; the caller's come back afterwards.

        For work on :attr:`model` between two calls, such as generating text.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Copies of the trained tensors by name: the adapter, or the full state dict.

        Raises:
            RunError: under DeepSpeed, which trains copies that this cannot reach.
        """
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replace the trained tensors; the optimizer keeps its moments.

        Raises:
            ValueError: names or shapes differ from :meth:`state`.
        """
        ...

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Copies of the optimizer's moments: slot (``exp_avg``, ``momentum_buffer``) → tensors under names of
        :meth:`state`. Empty before the first step, and where the optimizer keeps none.

        Raises:
            RunError: under DeepSpeed.
            ModelError: the optimizer keeps them in a form that cannot be merged, such as 8 bits.
        """
        ...

    def load_optimizer_state(self, slots: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the optimizer's moments in place; its counts of steps stay.

        Raises:
            ValueError: slots, names or shapes differ from :meth:`optimizer_state`.
        """
        ...

    def reset_optimizer(self) -> None:
        """Forget the moments and counts of steps, as before the first step; the learning rate's schedule goes on."""
        ...

    def second_moments(self) -> dict[str, Any]:
        """Adam's second moments without their bias, v / (1 - beta_2^t), as Fisher information.

        Returns:
            float32 tensors under the names of :meth:`state`, for those that are trained.

        Raises:
            ModelError: the optimizer has none, or has taken no step since it was reset.
        """
        ...

    def save(self) -> Path:
        """Write everything that :meth:`start` needs into a new folder under the staging folder and return it."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write model (or adapter) and tokenizer as a Hugging Face folder."""
        ...

    def close(self) -> None:
        """Let go of a paused training."""
        ...


class Backend(Protocol):
    """A way to train: bases, adapters and trainers that belong together."""

    def load_base(
        self,
        config: Any,
        plan: Any,
        *,
        label_names: list[str] | None = None,
        pad_token_id: int | None = None,
        local_rank: int = 0,
    ) -> Any:
        """The base model with its weights; arguments and errors of :func:`toolkit.modeling.load.load_base`."""
        ...

    def add_adapter(
        self, model: Any, config: Any, *, name: str = "default", autocast_dtype: bool = True
    ) -> Any:
        """Put a new adapter on it; see :func:`toolkit.modeling.adapters.add_adapter`."""
        ...

    def build_trainer(self, setup: TrainerSetup) -> ParticipantTrainer:
        """Build the trainer of a participant whose model comes from this backend."""
        ...


_B = TypeVar("_B", bound=Backend)
_MODULES = {"hf": "toolkit.training.hf", "unsloth": "toolkit.training.unsloth"}
"""Of the backends that are here; each registers itself. They are imported when one is asked for: it takes seconds,
and a process has Unsloth or does not."""
_BACKENDS: dict[str, Backend] = {}


def trainer_backend(name: str) -> Callable[[type[_B]], type[_B]]:
    """Register a class of backends under ``name``."""

    def register(backend: type[_B]) -> type[_B]:
        _BACKENDS[name] = backend()
        return backend

    return register


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: there is no such backend.
    """
    if name not in _BACKENDS and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _BACKENDS:
        raise InputError(f"unknown trainer backend {name!r}; there are: {', '.join(sorted(_MODULES))}")
    return _BACKENDS[name]
