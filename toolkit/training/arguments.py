"""From our options to the arguments of transformers' Trainer and TRL's SFTTrainer."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from toolkit.config.trainer_fields import GOVERNED
from toolkit.errors import ConfigError
from toolkit.training.throughput import Throughput


def build_arguments(
    config: Any, world: Mapping[str, Any], staging: Path, *, seed: int, chosen: Throughput | None = None
) -> TrainingArguments:
    """SFTConfig for a language model, TrainingArguments for a classifier, with :func:`asked_arguments`.

    Args:
        chosen: for throughput, applied to ``config`` already.

    Raises:
        ConfigError: an option or ``trainer_args`` has a value that the installed version refuses.
    """
    arguments_class = SFTConfig if config.task == "causal-lm" else TrainingArguments
    values = asked_arguments(config, world, staging, seed=seed)
    if chosen is not None:
        values["tf32"] = chosen.tf32 or None
        if chosen.fused_loss:
            values["loss_type"] = "nll"  # the other one replaces the model's forward
    try:
        return arguments_class(**values)
    except (TypeError, ValueError) as error:
        named = _options_named_in(str(error)) or (["trainer_args"] if config.trainer_args else [])
        where = f"{', '.join(named)}: " if named else ""
        raise ConfigError([f"{where}the installed {arguments_class.__name__} refuses: {error}"]) from error


def asked_arguments(config: Any, world: Mapping[str, Any], staging: Path, *, seed: int) -> dict[str, Any]:
    """The arguments of the trainer, by name.

    Logging, evaluation and checkpoints are switched off in the Trainer: the recipe's loop decides when they happen.

    Args:
        config: the recipe's options.
        world: what the launch plan decides (``toolkit.training.world.training_arguments``).
        staging: folder into which the Trainer writes checkpoints that are not committed yet.
        seed: of the participant.
    """
    causal = config.task == "causal-lm"
    values: dict[str, Any] = {
        "output_dir": str(staging),
        "num_train_epochs": config.max_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,  # transformers 5: below 1 it is a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch" if config.optim == "auto" else config.optim,
        "seed": seed,
        "data_seed": seed,
        "dataloader_num_workers": config.dataloader_workers,
        "logging_strategy": "steps",
        "logging_steps": 1,  # every step is counted; --logging-steps decides what is recorded
        "logging_nan_inf_filter": False,  # it replaces a NaN by the mean of the losses before it
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **_checkpointing(SFTConfig if causal else TrainingArguments, config),
        **world,
    }
    if causal:
        values |= {
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "completion_only_loss": False,
        }
        if (
            "lm_head" in config.lora_target_modules
        ):  # the chunked loss reads the head's weight past its adapter
            values["loss_type"] = "nll"
    return values | config.trainer_args


def _options_named_in(text: str) -> list[str]:
    """Our options that govern the arguments of the trainer which a message of it names."""
    words = set(re.findall(r"\w+", text))
    return sorted({option for argument, option in GOVERNED.items() if argument in words})


def _checkpointing(arguments_class: type, config: Any) -> dict[str, Any]:
    """transformers 5.23 renamed gradient to activation checkpointing; the old name warns there."""
    names = {field.name for field in dataclasses.fields(arguments_class)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    is_on = config.gradient_checkpointing is not False  # where it is left open the memory is what counts
    values: dict[str, Any] = {f"{prefix}_checkpointing": is_on}
    if is_on:
        values[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False}
    return values
