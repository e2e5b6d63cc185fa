"""The Hugging Face backend: TRL's SFTTrainer for language models, transformers' Trainer for classifiers.

``train()`` is called once for each participant and paused between steps (``pausable.py``).
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from toolkit.durable import write_json
from toolkit.errors import CheckpointError
from toolkit.evaluation.held_out import evaluate_held_out
from toolkit.modeling.states import load_trained_state, trained_state
from toolkit.training import rng
from toolkit.training.accounting import Accounting
from toolkit.training.arguments import build_arguments
from toolkit.training.contract import TrainerSetup, trainer_backend
from toolkit.training.order import EpochOrder
from toolkit.training.pausable import PausableCall

POSITION_NAME = "position.json"
"""Our part of a checkpoint: where the participant stands and what it has counted."""


class _Accounted(Trainer):
    """Hooks of a Trainer that count its steps and decide the order of its rows."""

    accounting: Accounting
    order: EpochOrder

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.accounting.begin_step(batches, label_shift=int(self._loss_shifts_labels))
        return batches, num_items

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.accounting.check_loss(loss, self.state.global_step)
        return loss

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """The recipe writes the model's card, once, into final_model/."""


class _LanguageModelTrainer(_Accounted, SFTTrainer):
    pass


class _ClassifierTrainer(_Accounted, Trainer):
    pass


class _Boundary(TrainerCallback):
    """Pauses ``train()`` where a step, with all that belongs to it, is over and the next has not begun."""

    def __init__(self, owner: "HFTrainer") -> None:
        self._owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.pause()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.pause_if_due()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._owner.pause_if_due()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        state.log_history.clear()  # training_history.json is ours; this list would grow in every checkpoint
        if logs and "loss" in logs:
            self._owner.end_step(logs)


@trainer_backend("hf")
class HFTrainer:
    """A :class:`~toolkit.training.contract.ParticipantTrainer` on transformers and TRL."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.name = setup.name
        self._setup = setup
        self._until_step = 0
        with self._own_adapter():
            self._trainer = self._build()
        self._call: PausableCall | None = None
        self._rng = rng.capture()

    def _build(self) -> Any:
        setup = self._setup
        config = setup.config
        arguments = build_arguments(config, setup.world, setup.staging)
        causal = config.task == "causal-lm"
        if not causal and config.gradient_checkpointing and isinstance(setup.model, PeftModel):
            # Without it no gradient reaches the adapters through checkpointed frozen layers. SFTTrainer does it itself.
            setup.model.enable_input_require_grads()
        trainer = (_LanguageModelTrainer if causal else _ClassifierTrainer)(
            model=setup.model,
            args=arguments,
            train_dataset=setup.train,
            data_collator=setup.collator,
            processing_class=setup.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Boundary(self))
        trainer.order = EpochOrder(
            len(setup.train),
            config.seed,
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
        with self._active():
            self._call.resume()

    def fit(self, until_step: int) -> bool:
        assert self._call is not None, "start() comes first"
        assert torch.is_grad_enabled(), "fit() inside torch.no_grad() would train nothing"
        self._until_step = min(until_step, self.num_steps)
        if self.step < self._until_step and not self._trainer.accounting.stop_agreed:
            with self._active():
                self._call.resume()
        return self.step >= self._until_step

    def evaluate(self) -> dict[str, float]:
        if self._setup.evaluation is None:
            return {}
        with self._active():
            return evaluate_held_out(
                self._forward_model(),
                self._setup.evaluation,
                self._setup.collator,
                task=self._setup.config.task,
                batch_size=self._setup.config.eval_batch_size,
                accelerator=self._trainer.accelerator,
                accepts_num_items=self._trainer.model_accepts_loss_kwargs,
            )

    def state(self) -> dict[str, torch.Tensor]:
        return trained_state(self._trainer.model, self._setup.adapter)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        load_trained_state(self._trainer.model, self._setup.adapter, state)

    def save(self) -> Path:
        with self._active():
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
        with self._active():
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
        while self.step >= self._until_step or self._trainer.accounting.stop_agreed:
            self.pause()

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
    def _active(self) -> Iterator[None]:
        """The participant's random number generators and adapter in place; the caller's come back afterwards."""
        callers = rng.capture()
        rng.restore(self._rng)
        try:
            with self._own_adapter():
                yield
        finally:
            self._rng = rng.capture()
            rng.restore(callers)

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
        self._trainer.accounting.load(position["totals"])
