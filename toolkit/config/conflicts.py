"""Rules that join several options. Each yields the options it is about and what is wrong.

"Given" means "differs from the default": the configuration that a run has saved holds every option, and it
must load again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from toolkit.config.names import did_you_mean


@dataclass(frozen=True)
class Conflict:
    """``place`` is where it is reported: an option, and perhaps a name inside it; ``options`` are all that
    are involved."""

    place: tuple[str, ...]
    options: tuple[str, ...]
    message: str


Rule = Callable[[BaseModel], Iterator[Conflict]]


def conflicts(config: BaseModel) -> list[Conflict]:
    """Return everything that is wrong between the options of a configuration, whatever groups it has."""
    return [conflict for each in RULES for conflict in each(config)]


def rule(function: Rule) -> Rule:
    """Register a rule of a part of the house that configurations know nothing of; it sees every recipe's."""
    RULES.append(function)
    return function


def given(config: BaseModel, name: str) -> bool:
    """Whether an option differs from its default."""
    field = type(config).model_fields.get(name)
    return field is not None and getattr(config, name) != field.get_default(call_default_factory=True)


def value_of(config: BaseModel, name: str) -> Any:
    """The value of an option; None where the recipe does not have it."""
    return getattr(config, name, None)


def _unavailable(config: BaseModel) -> Iterator[Conflict]:
    for name, reason in getattr(config, "unavailable", {}).items():
        if given(config, name):
            yield Conflict((name,), (name,), reason)


def _quantization(config: BaseModel) -> Iterator[Conflict]:
    four, eight = value_of(config, "load_in_4bit"), value_of(config, "load_in_8bit")
    if four and eight:
        both = ("load_in_8bit", "load_in_4bit")
        yield Conflict(both[:1], both, "excludes load_in_4bit; the base is held in 4 bits or in 8")
    if value_of(config, "finetuning") == "full":
        for name in ("load_in_4bit", "load_in_8bit"):
            if value_of(config, name):
                message = "needs finetuning: lora; quantized weights cannot be trained"
                yield Conflict((name,), (name, "finetuning"), message)
    if not four:
        for name in ("nested_quant", "quant_type"):
            if given(config, name):
                yield Conflict((name,), (name, "load_in_4bit"), "does nothing without load_in_4bit")


def _adapter(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "finetuning") != "full":
        return
    for name in type(config).model_fields:
        if (name.startswith("lora_") or name in ("use_dora", "use_rslora")) and given(config, name):
            yield Conflict(
                (name,), (name, "finetuning"), "does nothing with finetuning: full, which has no adapter"
            )
    if value_of(config, "merge_final"):
        message = "does nothing with finetuning: full; final_model/ is the whole model"
        yield Conflict(("merge_final",), ("merge_final", "finetuning"), message)


def _data(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "packing") and value_of(config, "length_grouping"):
        names = ("length_grouping", "packing")
        yield Conflict(names[:1], names, "does nothing with packing, which fills every sequence")
    if value_of(config, "eval_data") is not None and given(config, "eval_fraction"):
        names = ("eval_fraction", "eval_data")
        yield Conflict(names[:1], names, "excludes eval_data; held-out rows come from one of the two")


def _division(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "clients") is not None and given(config, "fractions"):
        names = ("fractions", "clients")
        yield Conflict(names[:1], names, "excludes clients; each client gets the same share")
    if value_of(config, "clients") is None and given(config, "valid_fraction"):
        names = ("valid_fraction", "clients")
        message = "does nothing without clients; the share of valid.json is the second of fractions"
        yield Conflict(names[:1], names, message)


def _classification(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "task") != "sequence-classification":
        return
    reasons = {
        "packing": "is for language models; a classifier reads one text at a time",
        "loss_on": "is for language models; a classifier is trained on the label",
        "sample_prompts": "is for language models; a classifier gives no answers in text",
        "chat_template": "is for language models; a classifier reads plain text",
    }
    for name, reason in reasons.items():
        if given(config, name):
            yield Conflict((name,), (name, "task"), reason)


def _unsloth(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "backend") != "unsloth":
        return
    if value_of(config, "task") == "sequence-classification":
        yield Conflict(("backend",), ("backend", "task"), "'unsloth' trains language models; task: causal-lm")
    if value_of(config, "deepspeed") is not None:
        message = "is not for backend: unsloth, which trains on several GPUs as plain data-parallel processes"
        yield Conflict(("deepspeed",), ("deepspeed", "backend"), message)


def _samples(config: BaseModel) -> Iterator[Conflict]:
    if given(config, "sample_system_prompt") and not value_of(config, "sample_prompts"):
        names = ("sample_system_prompt", "sample_prompts")
        yield Conflict(names[:1], names, "does nothing without sample_prompts")


def _launch(config: BaseModel) -> Iterator[Conflict]:
    if value_of(config, "cpu") and value_of(config, "gpu") is not None:
        yield Conflict(("gpu",), ("gpu", "cpu"), "excludes cpu")


def _trainer(config: BaseModel) -> Iterator[Conflict]:
    # Imported here: only a run that passes arguments through pays for looking into the installed packages.
    from toolkit.config import trainer_fields

    task = value_of(config, "task") or "causal-lm"
    for name, message in trainer_fields.trainer_args_problems(value_of(config, "trainer_args") or {}, task):
        yield Conflict(("trainer_args", name), ("trainer_args", "task"), message)
    named = {
        "lr_scheduler": ("transformers.trainer_utils", "SchedulerType"),
        "optim": ("transformers.training_args", "OptimizerNames"),
    }
    for option, (module, class_name) in named.items():
        if not given(config, option):
            continue
        try:
            values = trainer_fields.enum_values(module, class_name)
        except LookupError:  # another version keeps them elsewhere; the trainer will say
            continue
        if value_of(config, option) in trainer_fields.SCHEDULES_BY_METRIC:
            message = (
                f"'{value_of(config, option)}' follows evaluations inside the Trainer, and meldkit evaluates between "
                "its steps; take a schedule of the step, such as cosine"
            )
            yield Conflict((option,), (option,), message)
        elif value_of(config, option) not in {*values, *OURS.get(option, ())}:
            offered = sorted({*values, *OURS.get(option, ())} - trainer_fields.SCHEDULES_BY_METRIC)
            suggestion = did_you_mean(str(value_of(config, option)), offered)
            message = f"'{value_of(config, option)}' is not one of {', '.join(offered)}{suggestion}"
            yield Conflict((option,), (option,), message)


OURS = {"optim": ("auto",)}
"""Values beside those of transformers."""
RULES: list[Rule] = [
    _unavailable,
    _quantization,
    _adapter,
    _data,
    _division,
    _classification,
    _unsloth,
    _samples,
    _launch,
    _trainer,
]
