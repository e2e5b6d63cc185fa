"""Which arguments the installed trainer classes have, read from their source without importing them.

Importing transformers or trl to look takes seconds and brings torch; an abstract syntax tree takes 0.1 s.
"""

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.config.names import did_you_mean
from toolkit.config.renamed import renamed

TRAINER_CLASSES = {
    "causal-lm": ("trl.trainer.sft_config", "SFTConfig"),
    "sequence-classification": ("transformers.training_args", "TrainingArguments"),
}

# Argument of the trainer -> the option of ours that governs it.
GOVERNED = {
    "output_dir": "output_dir",
    "num_train_epochs": "max_epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optim",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "logging_strategy": "logging_steps",
    "logging_steps": "logging_steps",
    "log_level": "log_level",
    "dataloader_num_workers": "dataloader_workers",
    "resume_from_checkpoint": "resume",
    "report_to": "report_to",
    "run_name": "run_name",
    "project": "project",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "use_cpu": "cpu",
    "deepspeed": "deepspeed",
    "train_sampling_strategy": "length_grouping",
    "max_length": "max_length",
    "truncation_mode": "overlong",
    "packing": "packing",
    "packing_strategy": "packing",
    "eval_packing": "packing",
    "padding_free": "packing",
    "completion_only_loss": "loss_on",
    "assistant_only_loss": "loss_on",
    "dataset_text_field": "data_mapping",
    "chat_template_path": "chat_template",
    "trust_remote_code": "trust_remote_code",
}

# Arguments that meldkit decides: another value would break a run. The reason, for the error.
_SHARDING = "the option 'deepspeed' shards; other ways are not supported"
SET_BY_MELDKIT = {
    "do_train": "a recipe trains",
    "do_eval": "the option 'eval_every' decides",
    "do_predict": "a recipe evaluates before and after training",
    "local_rank": "the launcher sets it",
    "remove_unused_columns": "the data has the columns that are needed",
    "dataset_kwargs": "the data is prepared already",
    "shuffle_dataset": "the seed decides the order of the rows",
    "model_init_kwargs": "the model is built already",
    "label_names": "the data has its labels under one name",
    "save_only_model": "without the optimizer's state a checkpoint cannot be resumed from",
    "ignore_data_skip": "a resumed run would train on rows a second time",
    "auto_find_batch_size": "batch_size is recorded and must hold, also after a resume",
    "eval_on_start": "there is always an evaluation before training",
    "load_best_model_at_end": "final_model/ is the model after the last step",
    "enable_jit_checkpoint": "an interrupted run commits a checkpoint by itself",
    "restore_callback_states_from_checkpoint": "the run directory holds what a resume needs",
    "push_to_hub": "a run sends nothing anywhere; upload final_model/ when it is done",
    "dataloader_drop_last": "every row is trained in every epoch",
    "logging_nan_inf_filter": "it hides a loss that is not finite",
    "accelerator_config": "how batches are made and shared out is fixed, so that a resume finds the same ones",
    "parallelism_config": "the launch options decide the processes",
    "ddp_backend": "the launch options decide the device, and so the backend",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
}

# Schedules that wait for evaluations inside the Trainer. Here they are made between its steps.
SCHEDULES_BY_METRIC = {"reduce_lr_on_plateau", "greedy"}

# Options are recorded in every run directory; a secret must not be.
SECRET = {"hub_token"}


@cache
def trainer_fields(task: str) -> frozenset[str]:
    """Return the names of all arguments of the installed trainer class for ``task``.

    Raises:
        LookupError: the class is not found where the tested versions have it.
    """
    return frozenset(_fields(*TRAINER_CLASSES[task]))


@cache
def enum_values(module: str, class_name: str) -> tuple[str, ...]:
    """Return the values of an enumeration of an installed package, e.g. the names of the optimizers.

    Raises:
        LookupError: there is no such class.
    """
    body = _class(_tree(module), class_name, module).body
    constants = [n.value for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
    return tuple(str(constant.value) for constant in constants)


def trainer_args_problems(trainer_args: dict[str, Any], task: str) -> Iterator[tuple[str, str]]:
    """Yield name and problem of every argument that cannot be passed through. Reads nothing when there are
    none."""
    if not trainer_args:
        return
    module, class_name = TRAINER_CLASSES[task]
    try:
        fields = trainer_fields(task)
    except LookupError as error:
        package = module.split(".")[0]
        for name in trainer_args:
            yield name, f"cannot be checked against the installed {package} ({error})"
        return
    free = sorted(fields - GOVERNED.keys() - SET_BY_MELDKIT.keys() - SECRET)
    for name in trainer_args:
        if name in GOVERNED:
            yield name, f"is governed by the option '{GOVERNED[name]}'; use that"
        elif name in SET_BY_MELDKIT:
            yield name, f"is not passed through: {SET_BY_MELDKIT[name]}"
        elif name in SECRET:
            yield name, "is a secret, and options are recorded; set the environment variable HF_TOKEN"
        elif name not in fields:
            hint = renamed(name, set(GOVERNED.values()) | {"trainer_args"})
            if hint is not None:
                yield name, f"the installed {class_name} has no such argument; {hint.sentence}"
            else:
                yield name, f"the installed {class_name} has no such argument{did_you_mean(name, free)}"


def _source(module: str) -> Path | None:
    """Return the file of a module of an installed package. Only the finder of the top-level package is
    asked."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location, *rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _tree(module: str) -> ast.Module:
    path = _source(module)
    if path is None:
        raise LookupError(f"no source of {module}")
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(tree: ast.Module, name: str, module: str) -> ast.ClassDef:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"no class {name} in {module}")


def _fields(module: str, class_name: str) -> Iterator[str]:
    """Yield the annotated names of a dataclass and of its bases, across files."""
    tree = _tree(module)
    definition = _class(tree, class_name, module)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
    local = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for base in definition.bases:
        name = base.id if isinstance(base, ast.Name) else None
        if name in local:
            yield from _fields(module, str(name))
        elif name is not None and (origin := _imported_from(tree, module, name)) is not None:
            yield from _fields(origin, name)


def _imported_from(tree: ast.Module, module: str, name: str) -> str | None:
    """Return the module that defines ``name``, which ``tree`` imports; None for a class that brings no
    fields."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or name not in {alias.name for alias in node.names}:
            continue
        package = module.split(".")[: -node.level] if node.level else []
        origin = ".".join([*package, *([node.module] if node.module else [])])
        # `from transformers import TrainingArguments`: the package exports it lazily from a module of its
        # own.
        return (
            "transformers.training_args"
            if (origin, name) == ("transformers", "TrainingArguments")
            else origin
        )
    return None
