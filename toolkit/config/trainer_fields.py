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

# Arguments that meldkit sets itself: another value would break a run.
SET_BY_MELDKIT = {
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
    "remove_unused_columns",
    "dataset_kwargs",
    "shuffle_dataset",
    "model_init_kwargs",
    "label_names",
}

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
    free = sorted(fields - GOVERNED.keys() - SET_BY_MELDKIT - SECRET)
    for name in trainer_args:
        if name in GOVERNED:
            yield name, f"is governed by the option '{GOVERNED[name]}'; use that"
        elif name in SET_BY_MELDKIT:
            yield name, "is set by meldkit itself"
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
