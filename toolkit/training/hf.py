"""The Hugging Face backend: TRL's SFTTrainer for language models, transformers' Trainer for classifiers.

``train()`` is called once for each participant and paused between steps (``pausable.py``).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback

from toolkit.durable import write_json
from toolkit.errors import CheckpointError, DataError, RunError
from toolkit.evaluation.held_out import evaluate_rows
from toolkit.evaluation.outcomes import RowOutcomes, metrics
from toolkit.modeling.adapters import add_adapter
from toolkit.modeling.load import load_base
from toolkit.modeling.moments import unbiased_second_moments
from toolkit.modeling.states import (
    load_trained_state,
    trained_in_float32,
    trained_parameters,
    trained_state,
)
from toolkit.training import rng
from toolkit.training.accounting import Accounting
from toolkit.training.arguments import build_arguments
from toolkit.training.contract import TrainerSetup, trainer_backend
from toolkit.training.dense import DenseCollator
from toolkit.training.order import EpochOrder
from toolkit.training.pausable import PausableCall
from toolkit.training.slots import load_optimizer_slots, optimizer_slots
from toolkit.training.throughput import choose
from toolkit.training.trainers import ClassifierTrainer, LanguageModelTrainer

POSITION_NAME = "position.json"
"""Our part of a checkpoint: where the participant stands and what it has counted."""


class _Boundary(TrainerCallback):
    """Pauses ``train()`` where a step, with all that belongs to it, is over and the next has not begun."""

    def __init__(self, owner: "HFTrainer") -> None:
        self._owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.pause()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.begin_epoch()
        self._owner.pause_if_due()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.pause_if_due()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.agree()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        state.log_history.clear()  # training_history.json is ours; this list would grow in every checkpoint
        if logs and "loss" in logs:
            self._owner.end_step(logs)


class HFTrainer:
    """A :class:`~toolkit.training.contract.ParticipantTrainer` on transformers and TRL."""

    notes: Sequence[str] = ()

    def __init__(self, setup: TrainerSetup) -> None:
        self.name = setup.name
        self._setup = setup
        self._until_step = 0
        callers = rng.capture()
        with self._own_adapter():
            self._trainer = self._build()
        self._rng = rng.capture()  # transformers has seeded them with the participant's seed
        rng.restore(callers)
        self._call: PausableCall | None = None
        self._sync_gradients = True

    def _build(self) -> Any:
        setup = self._setup
        self.throughput = chosen = choose(
            setup.config,
            setup.model,
            setup.train["length"],
            setup.world,
            num_processes=PartialState().num_processes,
        )
        config = chosen.applied_to(setup.config)
        arguments = build_arguments(config, setup.world, setup.staging, seed=setup.seed, chosen=chosen)
        causal = config.task == "causal-lm"
        if not causal and config.gradient_checkpointing and isinstance(setup.model, PeftModel):
            # Without it no gradient reaches the adapters through checkpointed frozen layers. SFTTrainer does it itself.
            setup.model.enable_input_require_grads()
        trainer = (LanguageModelTrainer if causal else ClassifierTrainer)(
            model=setup.model,
            args=arguments,
            train_dataset=setup.train,
            data_collator=setup.collator
            if chosen.costs is None
            else DenseCollator(setup.tokenizer.pad_token_id, chosen.costs, tells_rows=chosen.tells_rows),
            processing_class=setup.tokenizer,
        )
        trainer.adapter = setup.adapter
        if isinstance(trainer, LanguageModelTrainer):
            trainer.has_fused_loss = chosen.fused_loss
        if not trainer.is_deepspeed_enabled:  # it keeps master weights of its own
            trained_in_float32(setup.model)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Boundary(self))
        trainer.order = EpochOrder(
            len(setup.train),
            setup.seed,
            lengths=setup.train["length"] if config.length_grouping else None,
            rows_per_step=config.batch_size * config.gradient_accumulation_steps * arguments.world_size,
        )
        accelerator: Any = trainer.accelerator
        trainer.accounting = Accounting(
            name=setup.name,
            on_step=setup.on_step,
            stop_requested=setup.stop_requested,
            gather=lambda values: accelerator.gather(values.to(accelerator.device)[None]).cpu(),
        )
        return trainer

    # Position

    @property
    def step(self) -> int:
        return self._trainer.state.global_step

    @property
    def epoch(self) -> float:
        return float(self._trainer.state.epoch or 0.0)

    @property
    def num_steps(self) -> int:
        return self._trainer.state.max_steps

    @property
    def num_steps_per_epoch(self) -> int:
        batches = math.ceil(
            len(self._setup.train) / (self._setup.config.batch_size * self._trainer.args.world_size)
        )
        return max(1, math.ceil(batches / self._setup.config.gradient_accumulation_steps))

    @property
    def totals(self) -> dict[str, Any]:
        return self._trainer.accounting.as_dict()

    @property
    def accelerator(self) -> Any:
        return self._trainer.accelerator

    @property
    def model(self) -> Any:
        return self._trainer.model

    @property
    def throughput_notes(self) -> Sequence[str]:
        return self.throughput.notes

    @property
    def underlying(self) -> Any:
        """transformers' Trainer, for callbacks that watch it."""
        return self._trainer

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Trained parameters and all parameters; 4-bit weights count as what they stand for."""
        if isinstance(self.model, PeftModel):
            return self.model.get_nb_trainable_parameters()
        counts = [
            (p.ds_numel if hasattr(p, "ds_numel") else p.numel(), p.requires_grad)
            for p in self.model.parameters()
        ]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    # Control, called by the recipe

    def start(self, resume_from: Path | None = None) -> None:
        assert self._call is None, "start() is called once"
        source = None if resume_from is None else str(resume_from)
        if resume_from is not None:
            self._load_position(resume_from)
        self._call = PausableCall(lambda: self._trainer.train(resume_from_checkpoint=source))
        with self.active():
            self._call.resume()

    def fit(self, until_step: int) -> bool:
        accounting = self._trainer.accounting
        assert self._call is not None, "start() comes first"
        assert torch.is_grad_enabled(), "fit() inside torch.no_grad() would train nothing"
        self._until_step = min(until_step, self.num_steps)
        if self.step < self._until_step and not accounting.stop_agreed:
            with self.active():
                try:
                    self._call.resume()
                except BaseException:
                    # What a failed step leaves would count in the gradient norm of the others on this base.
                    self._trainer.model.zero_grad()
                    raise
        return not accounting.stop_agreed

    def evaluate(self, rows: Any = None) -> dict[str, float]:
        if rows is None and self._setup.evaluation is None:
            return {}
        return metrics(self.evaluate_rows(rows))

    def evaluate_rows(self, rows: Any = None) -> RowOutcomes:
        rows = self._setup.evaluation if rows is None else rows
        if rows is None:
            raise DataError(f"{self.name} has no held-out rows", hint="give --eval-data or --eval-fraction")
        with self.active():
            return evaluate_rows(
                self._forward_model(),
                rows,
                self._setup.collator,
                task=self._setup.config.task,
                batch_size=self._setup.config.eval_batch_size,
                accelerator=self._trainer.accelerator,
            )

    def state(self) -> dict[str, torch.Tensor]:
        self._refuse_deepspeed()
        return trained_state(self._trainer.model, self._setup.adapter)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._refuse_deepspeed()
        load_trained_state(self._trainer.model, self._setup.adapter, state)

    def optimizer_state(self) -> dict[str, dict[str, torch.Tensor]]:
        return optimizer_slots(self._parameters(), self._optimizer())

    def load_optimizer_state(self, slots: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        load_optimizer_slots(self._parameters(), self._optimizer(), slots)

    def reset_optimizer(self) -> None:
        self._optimizer()
        self._trainer.reset_optimizer()

    def second_moments(self) -> dict[str, torch.Tensor]:
        return unbiased_second_moments(self._parameters(), self._optimizer())[0]

    def save(self) -> Path:
        with self.active():
            self._trainer._save_checkpoint(self._trainer.model_wrapped, trial=None)
        folder = self._setup.staging / f"checkpoint-{self.step}"
        if self._trainer.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
            position = {
                "participant": self.name,
                "step": self.step,
                "num_processes": self._trainer.args.world_size,
                "totals": self.totals,
            }
            write_json(folder / POSITION_NAME, position)
        return folder

    def save_model(self, folder: Path) -> None:
        with self.active():
            self._trainer.save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)

    def close(self) -> None:
        if self._call is not None:
            self._call.close()

    # Called from inside train()

    def pause(self) -> None:
        assert self._call is not None
        self._call.pause()

    def pause_if_due(self) -> None:
        accounting = self._trainer.accounting
        while self.step >= self._until_step or accounting.stop_agreed:
            self.pause()
            accounting.restart_clock()

    def begin_epoch(self) -> None:
        # After a resume with several processes accelerate's chain of samplers is one link too long for its set_epoch.
        self._trainer.order.set_epoch(self.step // self.num_steps_per_epoch)

    def agree(self) -> None:
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        self._trainer.accounting.agree(
            self.step, self._trainer.step_grad_norm, may_skip_step=scaler is not None and scaler.is_enabled()
        )

    def end_step(self, logs: dict[str, Any]) -> None:
        self._trainer.accounting.end_step(
            step=self.step,
            epoch=self.epoch,
            loss=float(logs["loss"]),
            grad_norm=None if logs.get("grad_norm") is None else float(logs["grad_norm"]),
            learning_rate=float(logs["learning_rate"]),
        )

    # Inside

    @contextmanager
    def _own_adapter(self) -> Iterator[None]:
        """The participant's adapter active on the shared base."""
        model, adapter = self._setup.model, self._setup.adapter
        if adapter is not None and model.active_adapter != adapter:
            model.set_adapter(adapter)
        yield

    @contextmanager
    def active(self) -> Iterator[None]:
        callers = rng.capture()
        rng.restore(self._rng)
        # One object for all Accelerators of the process; a paused step has it set already.
        gradients = self._trainer.accelerator.gradient_state
        callers_sync = gradients.sync_gradients
        gradients._set_sync_gradients(self._sync_gradients)
        try:
            with self._own_adapter():
                yield
        finally:
            self._sync_gradients = gradients.sync_gradients
            gradients._set_sync_gradients(callers_sync)
            self._rng = rng.capture()
            rng.restore(callers)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return trained_parameters(self._trainer.model, self._setup.adapter)

    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without accelerate's wrapping, which hides its class."""
        self._refuse_deepspeed()
        assert self._call is not None, "start() makes the optimizer"
        return self._trainer.optimizer.optimizer

    def _refuse_deepspeed(self) -> None:
        if self._trainer.is_deepspeed_enabled:
            raise RunError(
                f"{self.name}: under DeepSpeed the trained tensors are sharded copies that cannot be read or replaced",
                hint="merge without --deepspeed",
            )

    def _forward_model(self) -> torch.nn.Module:
        trainer = self._trainer
        return trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model

    def _load_position(self, checkpoint: Path) -> None:
        try:
            position = json.loads((checkpoint / POSITION_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint / POSITION_NAME} is missing or damaged: {error}") from error
        processes = self._trainer.args.world_size
        if position["num_processes"] != processes:
            raise CheckpointError(
                f"{checkpoint} was written by {position['num_processes']} processes, this run has {processes}",
                hint="resume with the same --num-processes",
            )
        if position["participant"] != self.name:
            raise CheckpointError(
                f"{checkpoint} is a checkpoint of {position['participant']}, not of {self.name}"
            )
        self._trainer.accounting.load(position["totals"])


@trainer_backend("hf")
class HFBackend:
    """transformers, TRL and PEFT as they are."""

    load_base = staticmethod(load_base)
    add_adapter = staticmethod(add_adapter)
    build_trainer = HFTrainer
