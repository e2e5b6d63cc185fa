"""What makes training faster and leaves the loss as it is but for rounding: chosen for a model, its rows and a machine.

Each choice has an option; ``--throughput auto`` decides those that are not given, and every decision comes with its
reason. Precision is decided before, by the launch plan.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from accelerate import PartialState

from toolkit.errors import LaunchError
from toolkit.reporting import resources
from toolkit.training import probing
from toolkit.training.dense import Costs
from toolkit.training.fused_loss import head_of, plain
from toolkit.training.row_attention import use_row_attention

MAX_FLAT = 4096
"""Positions of rows in one sequence where attention computes all pairs and masks them."""
BATCH_COST = {"cpu": 32, "cuda": 1024}
"""A micro-batch's fixed cost in tokens. CPU: reading the weights of SmolLM2-135M in three passes against its speed.
CUDA: starting the kernels of 30 layers takes about as long as computing a thousand tokens, by estimate."""
MEMORY_SHARE = 0.4
"""Of the memory that is free, what activations may take before they are computed again in the backward pass."""


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The choices for one trainer.

    Attributes:
        costs: of micro-batches, for a dense layout; None for rows as they come.
        tells_rows: attention takes the rows of one sequence one by one (:mod:`toolkit.training.row_attention`).
        whole_step: the batches of an optimizer step are laid out together.
        fused_loss: :mod:`toolkit.training.fused_loss` in place of the library's.
        gradient_checkpointing, optim, tf32: as the trainer's arguments of these names.
        notes: each choice with its reason.
    """

    costs: Costs | None
    tells_rows: bool
    whole_step: bool
    fused_loss: bool
    gradient_checkpointing: bool
    optim: str
    tf32: bool
    notes: tuple[str, ...]

    def applied_to(self, config: Any) -> Any:
        """The options with the choices in place, as the trainer's arguments are made from."""
        update: dict[str, Any] = {"gradient_checkpointing": self.gradient_checkpointing, "optim": self.optim}
        if self.whole_step:
            update["batch_size"] = config.batch_size * config.gradient_accumulation_steps
            update["gradient_accumulation_steps"] = 1
        return config.model_copy(update=update)


def choose(
    config: Any, model: Any, lengths: Any, world: Mapping[str, Any], *, num_processes: int
) -> Throughput:
    """Choose for a model whose adapter is in place.

    Args:
        config: the recipe's options.
        model: before the trainer has it; it is put on the device.
        lengths: tokens of each training row.
        world: the trainer's arguments that the launch plan decides.
        num_processes: of this participant.

    Raises:
        LaunchError: an option asks for what this model or this launch cannot do.
    """
    return _Chooser(config, model, lengths, world, num_processes).choose()


class _Chooser:
    def __init__(
        self, config: Any, model: Any, lengths: Any, world: Mapping[str, Any], num_processes: int
    ) -> None:
        self.config, self.model, self.world = config, model, world
        self.is_auto = config.throughput == "auto"
        self.num_processes = num_processes
        self.device = torch.device(PartialState().device or "cpu").type
        self.capacity = config.batch_size * max(lengths)
        self.is_ours = config.backend == "hf" and "deepspeed" not in world
        self.is_causal = config.task == "causal-lm"
        self.tells_rows = False
        self.notes: list[str] = []

    def choose(self) -> Throughput:
        if self.is_ours and not hasattr(
            self.model, "hf_device_map"
        ):  # where bitsandbytes has put it, it stays
            self.model.to(PartialState().device)
        fused_loss = self._fused_loss()
        costs = self._costs()
        is_whole = costs is not None and self.num_processes == 1
        return Throughput(
            costs=costs,
            tells_rows=self.tells_rows,
            whole_step=is_whole,
            fused_loss=fused_loss,
            gradient_checkpointing=self._gradient_checkpointing(),
            optim=self._optim(),
            tf32=self._tf32(),
            notes=tuple(self.notes),
        )

    def _asked(self, option: str, asked: bool | None, can: bool, why_not: str) -> bool | None:
        """What the option says where it says something; False without a way; None where auto decides."""
        if asked and not can:
            raise LaunchError(f"--{option}: {why_not}", hint=f"leave out --{option}")
        if asked is not None:
            return asked
        return None if can and self.is_auto else False

    def _fused_loss(self) -> bool:
        can = self.is_causal and self.is_ours and self.num_processes == 1
        asked = self._asked(
            "fused-loss",
            self.config.fused_loss,
            can,
            "is for a language model in one process, without DeepSpeed",
        )
        if asked is False:
            return False
        if asked is None and "loss_type" in self.config.trainer_args:
            return False
        if head_of(self.model) is None:
            agrees, why = False, "the head is quantized, has a bias or an adapter"
        else:
            agrees, why = (
                probing.fused_loss_agrees(self.model, self._autocast()),
                "it is not this model's loss",
            )
        if asked and not agrees:
            raise LaunchError(f"--fused-loss: {why}", hint="leave out --fused-loss")
        self.notes.append(
            "fused loss: gradients straight from the hidden states, no logits kept or computed twice"
            if agrees
            else f"no fused loss: {why}"
        )
        return agrees

    def _costs(self) -> Costs | None:
        config = self.config
        wanted = None if config.step_layout == "auto" else config.step_layout == "dense"
        can = self.is_causal and self.is_ours and not config.packing
        why_not = "dense is for language models of the hf backend, without --packing or DeepSpeed"
        asked = self._asked("step-layout", wanted, can, why_not)
        if asked is False:
            return None
        is_flash = config.attn_implementation.startswith("flash")
        self.tells_rows = not is_flash and use_row_attention(plain(self.model))
        apart = is_flash or probing.rows_stay_apart(self.model, self._autocast(), tells_rows=self.tells_rows)
        is_row_wise = is_flash or self.tells_rows
        limit = self.capacity if is_row_wise else MAX_FLAT
        costs = Costs(
            pair=probing.pair_cost(self.model),
            batch=BATCH_COST[self.device],
            capacity=self.capacity,
            flat=limit if apart else 0,
            is_row_wise=is_row_wise,
        )
        together = "all rows of a step" if self.num_processes == 1 else "the rows of a batch"
        how = (
            "padded or one after the other" if apart else "padded (here rows in one sequence see each other)"
        )
        self.notes.append(
            f"dense layout: {together} in micro-batches of at most {self.capacity:,} positions, {how}, whichever "
            "computes least"
        )
        return costs

    def _gradient_checkpointing(self) -> bool:
        asked = self.config.gradient_checkpointing
        if asked is not None:
            return asked
        if not (self.is_auto and self.is_causal and self.is_ours):
            return True
        needed = self.capacity * probing.activation_bytes_per_token(self.model, self._autocast())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        free = _free_bytes(self.device) - 12 * trained  # gradients and AdamW's two moments in float32
        fits = needed <= MEMORY_SHARE * free
        self.notes.append(
            f"{'no gradient' if fits else 'gradient'} checkpointing: activations of {self.capacity:,} positions take "
            f"about {needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB are free"
        )
        return not fits

    def _optim(self) -> str:
        if self.config.optim != "auto":
            return self.config.optim
        if self.is_auto and self.is_ours and self.device in ("cpu", "cuda"):
            self.notes.append("optimizer adamw_torch_fused: one kernel for all tensors")
            return "adamw_torch_fused"
        return "adamw_torch"

    def _tf32(self) -> bool:
        """Only products in float32 change; bf16 and fp16 have none to speak of."""
        can = self.device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        asked = self._asked("tf32", self.config.tf32, can, "needs a GPU of compute capability 8.0 or more")
        if asked is None:
            self.notes.append("tf32: products of float32 matrices on tensor cores, with 10 bits of mantissa")
        return asked is not False

    def _autocast(self) -> AbstractContextManager[Any]:
        kinds: dict[str, Callable[[], Any]] = {
            "bf16": lambda: torch.autocast(self.device, torch.bfloat16),
            "fp16": lambda: torch.autocast(self.device, torch.float16),
        }
        made = [make for name, make in kinds.items() if self.world.get(name)]
        return made[0]() if made else contextlib.nullcontext()


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min(psutil.virtual_memory().available, resources.memory_limit_bytes())
