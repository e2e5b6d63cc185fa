"""transformers' and TRL's trainers with our counts, our order of the rows, and checkpoints of one adapter of many."""

import contextlib
import copy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

from toolkit.modeling.states import load_trained_state
from toolkit.training.accounting import Accounting
from toolkit.training.fused_loss import fused_loss
from toolkit.training.order import EpochOrder


class HookedTrainer(Trainer):
    """What the trainers of both tasks share.

    Attributes:
        accounting, order, adapter: set by the owner before training.
        step_grad_norm: of the last step, before clipping.
        untouched: what the optimizer held before its first step: nothing, with few exceptions (Adagrad).
    """

    accounting: Accounting
    order: EpochOrder
    adapter: str | None
    step_grad_norm: float | None
    untouched: dict[str, Any]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.untouched = copy.deepcopy(optimizer.state_dict()["state"])
        return optimizer

    def reset_optimizer(self) -> None:
        """Put the optimizer's state back to that before its first step; learning rates stay."""
        optimizer = cast(Any, self.optimizer)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copy.deepcopy(self.untouched), "param_groups": groups})

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.accounting.begin_step(batches, label_shift=int(self._loss_shifts_labels))
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        layout = inputs.pop("layout", None)
        micro_batches = [inputs] if layout is None else layout.micro_batches(inputs)
        losses = []
        for number, batch in enumerate(micro_batches, 1):
            # Processes exchange gradients once, with the last micro-batch of a step.
            is_last = number == len(micro_batches)
            with contextlib.nullcontext() if is_last else cast(Any, self.accelerator).no_sync(model):
                losses.append(super().training_step(model, batch, num_items_in_batch))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self.accounting.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.step_grad_norm = None if grad_norm is None else float(grad_norm)
        return grad_norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        # PEFT saves all adapters of the base, and each but "default" into a folder of its own.
        folder, model, tokenizer = (
            Path(str(output_dir)),
            cast(Any, self.model),
            cast(Any, self.processing_class),
        )
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(
            str(folder),
            state_dict=state_dict,
            selected_adapters=[self.adapter],
            save_embedding_layers=False,
        )
        if self.adapter != "default":
            for path in (folder / self.adapter).iterdir():
                path.rename(folder / path.name)
            (folder / self.adapter).rmdir()
        tokenizer.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers would load it in another dtype than it was trained in (PEFT's autocast of adapters).
        tensors = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        load_trained_state(cast(Any, self.model), self.adapter, tensors)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.args.device.type != "cpu":
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # transformers 5.17 loads to "cpu:0" where several processes share the CPU, a place that torch does not know.
        for name, owner in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            cast(Any, owner).load_state_dict(state)

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """The recipe writes the model's card, once, into final_model/."""


class LanguageModelTrainer(HookedTrainer, SFTTrainer):
    """Attributes:
    has_fused_loss: train with :mod:`toolkit.training.fused_loss`.
    """

    has_fused_loss: bool = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.has_fused_loss or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with cast(Any, self.accelerator).autocast():
            return fused_loss(model, inputs, num_items_in_batch)


class ClassifierTrainer(HookedTrainer):
    """Encoders take any keyword and ignore ``num_items_in_batch``; transformers then neither divides their loss by the
    accumulated batches nor weights ragged ones. So the loss is ours."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, compute_loss_func=mean_over_rows)


def mean_over_rows(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int
) -> torch.Tensor:
    """Cross-entropy of logits [B, labels] summed over the batch, divided by the rows of the whole step."""
    loss_sum = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss_sum / num_items_in_batch
