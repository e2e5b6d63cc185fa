"""Participants: who trains, on which rows, with which trainer, and how far each has come."""

import gc
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers

from toolkit.data.collate import Collator
from toolkit.data.prepare import Prepared
from toolkit.launch.plan import LaunchPlan
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.training.contract import ParticipantTrainer, StepStatistics, TrainerSetup, find_backend
from toolkit.training.world import assert_world, training_arguments

_IN_BETWEEN = "in-between"
"""An adapter that lives while the only other one gives way to one of the same name."""

Status = Literal["active", "stopped", "failed"]
"""Trains; has stopped early and keeps what it has; has failed and takes no part any more."""


@dataclass
class Standing:
    """How far a participant has come, as JSON values: a part of every commit of the loop.

    Attributes:
        status: see :data:`Status`.
        num_merges: merges that it has taken over.
        epoch_loss_sum, epoch_steps: of the epoch that it is in.
        metrics: of its last evaluation on its own held-out rows.
        stop_reason: why it stopped early.
        early_stopping: state of its :class:`~toolkit.rounds.schedule.early_stopping.EarlyStopping`.
        num_failures: how often it has failed; after the last one :attr:`error` says why.
        killings: ids of those of them that ended its process.
    """

    status: Status = "active"
    num_merges: int = 0
    epoch_loss_sum: float = 0.0
    epoch_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stop_reason: str | None = None
    early_stopping: dict[str, Any] = field(default_factory=dict)
    num_failures: int = 0
    error: str | None = None
    killings: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Participant:
    """One participant of a run.

    Attributes:
        name: a locale or a client; the name of its folder in the run directory.
        prepared: its rows.
        trainer: paused between calls.
        store: its checkpoints.
        standing: what of it is neither in the trainer nor in its checkpoint.
    """

    name: str
    prepared: Prepared
    trainer: ParticipantTrainer
    store: CheckpointStore
    standing: Standing = field(default_factory=Standing)

    @property
    def is_active(self) -> bool:
        return self.standing.status == "active"

    @property
    def has_rows_to_evaluate(self) -> bool:
        return self.prepared.evaluation is not None

    def count_step(self, step: StepStatistics) -> None:
        self.standing.epoch_loss_sum += step.loss
        self.standing.epoch_steps += 1

    def end_epoch(self) -> float:
        """Mean training loss of the epoch that is over; counting begins anew."""
        standing = self.standing
        mean = standing.epoch_loss_sum / max(standing.epoch_steps, 1)
        standing.epoch_loss_sum, standing.epoch_steps = 0.0, 0
        return mean


def seed_of(name: str, seed: int) -> int:
    """A participant's own seed, below 2^31: row order and dropout differ between participants, by name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little") >> 1


class TrainerFactory:
    """Builds the trainers of one run: on one frozen base with LoRA, each on a model of its own with full fine-tuning.

    All start from the same weights: the base, new heads and new adapters are made from the run's seed.
    """

    def __init__(
        self, config: Any, plan: LaunchPlan, tokenizer: Any, label_names: list[str] | None, processes: Any
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.label_names = label_names
        self._plan = plan
        self._processes = processes
        self._backend = find_backend(config.backend)
        self._is_lora = config.finetuning == "lora"
        self._shared: Any = None
        """The base with the adapters of all participants on it (LoRA)."""
        self._unused: list[str] = []
        """Adapters on it whose trainers are gone."""

    def build(
        self,
        name: str,
        prepared: Prepared,
        staging: Path,
        *,
        on_step: Callable[[StepStatistics], None],
        stop_requested: Callable[[], bool],
        adapter: str | None = None,
        seed_name: str | None = None,
    ) -> ParticipantTrainer:
        """A trainer that has not started.

        Args:
            name: of the participant.
            staging: folder for checkpoints that are not committed yet.
            adapter: name of its adapter on the shared base; None for the participant's name.
            seed_name: the name that decides its seed; None for the participant's name.
        """
        config = self.config
        adapter = (adapter or name) if self._is_lora else None
        setup = TrainerSetup(
            name=name,
            model=self._model(adapter),
            adapter=adapter,
            tokenizer=self.tokenizer,
            train=prepared.train,
            evaluation=prepared.evaluation,
            collator=Collator(
                self.tokenizer.pad_token_id,
                config.task,
                packing=config.packing,
                flatten=config.packing and config.attn_implementation.startswith("flash"),
            ),
            config=config,
            world=training_arguments(self._plan, config),
            staging=staging,
            on_step=on_step,
            stop_requested=stop_requested,
            seed=seed_of(seed_name or name, config.seed),
        )
        trainer = self._backend.build_trainer(setup)
        assert_world(self._plan, trainer.accelerator)
        return trainer

    def discard(self, trainer: ParticipantTrainer, adapter: str | None = None) -> None:
        """Let go of a trainer and of what it holds in memory."""
        trainer.close()
        if self._is_lora:
            self._unused.append(adapter or trainer.name)
            self._delete_unused()
        gc.collect()  # a trainer and its callbacks refer to each other

    def _delete_unused(self) -> None:
        """PEFT cannot add an adapter to a model that has lost its last one, so that one stays until the next comes."""
        while self._unused and len(self._shared.peft_config) > 1:
            self._shared.delete_adapter(self._unused.pop())

    def _model(self, adapter: str | None) -> Any:
        transformers.set_seed(self.config.seed)
        if adapter is None:
            return self._load_base()
        if self._shared is None:
            self._shared = self._load_base()
            transformers.set_seed(self.config.seed)
        if adapter in self._unused:  # the last one, whose name comes back
            self._shared = self._backend.add_adapter(self._shared, self.config, name=_IN_BETWEEN)
            self._delete_unused()
            self._unused.append(_IN_BETWEEN)
            transformers.set_seed(self.config.seed)
        self._shared = self._backend.add_adapter(self._shared, self.config, name=adapter)
        self._delete_unused()
        self._shared.set_adapter(adapter)
        return self._shared

    def _load_base(self) -> Any:
        model = self._backend.load_base(
            self.config,
            self._plan,
            label_names=self.label_names,
            pad_token_id=self.tokenizer.pad_token_id,
            local_rank=self._processes.local_process_index,
        )
        if self._processes.num_processes == 1:
            # transformers writes weights on rank 0 of torch.distributed only; each rank of a team has its own models.
            model.should_save_on_this_rank = _says_so
        return model


def _says_so(is_main_process: bool) -> bool:
    return is_main_process
