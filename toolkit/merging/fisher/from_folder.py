"""Fisher information of a model or adapter that lies in a folder, over data in any form that training reads."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from safetensors import safe_open

from toolkit.config.fisher_command import FisherOptions
from toolkit.config.recipes import CentralizedConfig
from toolkit.data.prepare import prepare
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import DataError, ModelError
from toolkit.launch.plan import resolve_plan
from toolkit.merging.fisher.estimate import OnProgress, estimate_fisher
from toolkit.merging.fisher.likelihood import Task
from toolkit.merging.fisher.storage import Fisher
from toolkit.modeling.load import load_base, load_model_config
from toolkit.modeling.source import find_model


def fisher_of(
    model: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Fisher:
    """Estimate the diagonal Fisher information of a saved model, or of an adapter on it, over a data set.

    Args:
        model: folder or hub id of the model, or of the adapter's base.
        data: a file, folder or hub id, as in training.
        adapter: folder of a LoRA adapter; its parameters are estimated then.
        on_progress: called with the number of examples done and of all.
        options: other fields of :class:`~toolkit.config.fisher_command.FisherOptions`: kind, num_examples,
            batch_size, seed, task, max_length, ...

    Returns:
        what :func:`~toolkit.merging.fisher.estimate_fisher` returns; ``save(path)`` writes it.

    Raises:
        ModelError, DataError: the model or the data cannot be read, or do not fit together.
        MergeError: a gradient is not finite.
    """
    asked = FisherOptions(
        model=str(model), data=str(data), adapter=Path(adapter) if adapter else None, **options
    )
    return fisher_by_options(asked, on_progress)


def fisher_by_options(asked: FisherOptions, on_progress: OnProgress | None = None) -> Fisher:
    """:func:`fisher_of` with its options in one value."""
    task = _task(asked)
    run = _as_training_run(asked, task)
    plan = resolve_plan(run)
    tokenizer = load_tokenizer(run)
    class_names = _class_names(asked, run) if task == "sequence-classification" else None
    prepared = prepare(run, tokenizer, task, seed=asked.seed, enforce=False, use_cache=False)
    rows: Any = prepared.train
    if class_names is not None:
        rows = _Renumbered(rows, class_numbers(prepared.label_names or [], class_names))
    model = load_base(run, plan, label_names=class_names, pad_token_id=tokenizer.pad_token_id)
    if asked.adapter is not None:
        model = PeftModel.from_pretrained(model, str(asked.adapter), is_trainable=True)
    model = model.to(plan.device)
    fisher = estimate_fisher(
        model,
        rows,
        task=task,
        kind=asked.kind,
        num_examples=asked.num_examples,
        batch_size=asked.batch_size,
        seed=asked.seed,
        on_progress=on_progress,
    )
    _check_names(fisher, asked)
    return fisher


def _as_training_run(asked: FisherOptions, task: Task) -> CentralizedConfig:
    """Model and data are read as a training run reads them."""
    shared = FisherOptions.model_fields.keys() & CentralizedConfig.model_fields.keys()
    values = {name: getattr(asked, name) for name in shared}
    values |= {
        "task": task,
        "output_dir": Path(),  # a field that has to be there: nothing is trained, and nothing written
        "finetuning": "full" if asked.adapter is None else "lora",
        "num_processes": 1,
    }
    return CentralizedConfig.model_validate(values)


def _task(asked: FisherOptions) -> Task:
    if asked.task != "auto":
        return asked.task
    if asked.adapter is not None:
        task_type = _json(asked.adapter / "adapter_config.json").get("task_type")
        is_classifier = task_type == "SEQ_CLS"
    else:
        names = load_model_config(asked).architectures or []
        is_classifier = any("ForSequenceClassification" in name for name in names)
    return "sequence-classification" if is_classifier else "causal-lm"


def _class_names(asked: FisherOptions, run: CentralizedConfig) -> list[str]:
    """The classes of a trained classifier, in order of their numbers."""
    if asked.adapter is None:
        by_number = load_model_config(run).id2label
    else:
        by_number = _json(asked.adapter / "config.json").get("id2label", {})
        if not by_number:
            raise ModelError(
                f"{asked.adapter} does not say which classes it has",
                hint="an adapter's folder written by meldkit has config.json with id2label",
            )
    return [name for _, name in sorted((int(number), str(name)) for number, name in by_number.items())]


def class_numbers(data_names: Sequence[str], model_names: Sequence[str]) -> list[int]:
    """The model's number of each class of the data.

    Raises:
        DataError: the data has a class that the model does not have.
    """
    if set(data_names) <= set(model_names):
        return [list(model_names).index(name) for name in data_names]
    has_names = list(model_names) != [f"LABEL_{number}" for number in range(len(model_names))]
    if not has_names and len(data_names) == len(model_names):
        return list(range(len(data_names)))  # numbered in the same way when it was trained on them
    foreign = sorted(set(data_names) - set(model_names))
    raise DataError(
        f"the data has {len(data_names)} classes, the model {len(model_names)}; it does not have "
        f"{', '.join(map(repr, foreign[:5]))}",
        hint=f"the model's classes are {', '.join(map(repr, list(model_names)[:5]))}, ...",
    )


class _Renumbered(Sequence[dict[str, Any]]):
    """Rows of the data with the model's numbers of the classes."""

    def __init__(self, rows: Any, numbers: list[int]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        return row | {"labels": self._numbers[row["labels"]]}


def _check_names(fisher: Fisher, asked: FisherOptions) -> None:
    """Every tensor has the name of one in the file: a head that was never trained has none."""
    folder = asked.adapter or _model_folder(asked)
    if folder is None:
        return
    there = set(_tensor_names(folder))
    foreign = sorted(fisher.tensors.keys() - there)
    if there and foreign:
        raise ModelError(
            f"{folder} has no tensor {foreign[0]} ({len(foreign)} of {len(fisher.tensors)} are missing), so their "
            "values are random and their Fisher information says nothing",
            hint="train the model on this task first, or give the --task that it was trained for",
        )


def _model_folder(asked: FisherOptions) -> Path | None:
    """Where the model that was loaded lies; None where the hub's cache does not say."""
    source = find_model(asked.model)
    if source.is_local:
        return Path(source.name)
    config = try_to_load_from_cache(source.name, "config.json", revision=asked.revision)
    return Path(config).parent if isinstance(config, str) else None


def _tensor_names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            yield from stream.keys()


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
