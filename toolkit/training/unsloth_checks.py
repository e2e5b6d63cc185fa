"""Whether Unsloth made what it was asked for.

Where it cannot do something it prints a line and does something else: 16 bits for 8, another optimizer, no packing.
Here such a thing is an error, or a note where the training is the same but for rounding.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig

from toolkit.config.trainer_fields import GOVERNED
from toolkit.errors import BackendError

SAME_OPTIMIZER = {"adamw_torch", "adamw_torch_fused"}
"""One algorithm in two implementations, which round differently."""
QUANTIZED_LAYERS = {"Linear4bit": "4 bits", "Linear8bitLt": "8 bits"}
_QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)


def check_base(model: torch.nn.Module, dtype: torch.dtype, quantization: BitsAndBytesConfig | None) -> None:
    """Check type and quantization of a base that was loaded.

    Args:
        dtype: of the weights that are not quantized.
        quantization: what was asked for; None for none.

    Raises:
        BackendError: it is another.
    """
    wrong = []
    asked = {
        "4 bits": bool(quantization and quantization.load_in_4bit),
        "8 bits": bool(quantization and quantization.load_in_8bit),
    }
    found = {QUANTIZED_LAYERS.get(type(module).__name__) for module in model.modules()}
    for bits, is_asked in asked.items():
        if is_asked != (bits in found):
            wrong.append(f"{bits} were asked for, and no layer has them" if is_asked else f"layers in {bits}")
    if not wrong and quantization is not None:
        made: Any = getattr(model.config, "quantization_config", None)
        made = made if isinstance(made, Mapping) else vars(made)
        for name in _QUANTIZATION:
            was, value = getattr(quantization, name), made.get(name, made.get(f"_{name}"))
            if was != value:
                wrong.append(f"{name} is {value}, and {was} was asked for")
    types = {
        p.dtype
        for name, p in model.named_parameters()
        if p.is_floating_point() and not hasattr(p, "quant_state")
    }
    if types != {dtype}:
        wrong.append(f"its weights are {_names(types)}, and {_names({dtype})} was asked for")
    _raise("loaded another base than asked for", wrong)


def check_adapter(model: PeftModel, name: str, asked: LoraConfig, modules: set[str]) -> None:
    """Check the adapter that was put on a base.

    Args:
        name: of the adapter.
        asked: its configuration, but for the names of the modules.
        modules: that it belongs on.

    Raises:
        BackendError: it is another.
    """
    made = model.peft_config[name]
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "task_type")
    wrong = [
        f"{field} is {getattr(made, field)}, and {getattr(asked, field)} was asked for"
        for field in fields
        if getattr(made, field) != getattr(asked, field)
    ]
    kept = [sorted(config.modules_to_save or []) for config in (made, asked)]  # pyright: ignore[reportAttributeAccessIssue] - a field of LoraConfig
    if kept[0] != kept[1]:
        wrong.append(f"modules_to_save is {kept[0]}, and {kept[1]} was asked for")
    base: Any = model.base_model.model
    adapted = {path for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    for verb, difference in (("lacks", modules - adapted), ("is also on", adapted - modules)):
        if difference:
            wrong.append(f"it {verb} {', '.join(sorted(difference)[:3])} ({len(difference)} in all)")
    _raise("made another adapter than asked for", wrong)


def check_arguments(asked: Mapping[str, Any], made: Any) -> list[str]:
    """Check the trainer's arguments.

    Args:
        asked: by name (``toolkit.training.arguments.asked_arguments``).
        made: the arguments that the trainer has.

    Returns:
        What is not the same, and trains the same but for rounding: a sentence each.

    Raises:
        BackendError: what is trained would be another.
    """
    wrong, notes = [], []
    for name, was in asked.items():
        value = _plain(getattr(made, name, None))
        was = _plain(was)
        if not isinstance(was, bool | int | float | str) or value == was or name == "report_to":
            continue
        option = f"--{GOVERNED.get(name, name).replace('_', '-')}"
        if name == "optim" and {value, was} <= SAME_OPTIMIZER:
            notes.append(f"Unsloth trains with {option} {value} in place of {was}: the same but for rounding")
        else:
            wrong.append(f"{name} is {value}, and {was} was asked for ({option})")
    _raise("would train otherwise than asked for", wrong)
    return notes


def check_trainer(trainer: Any) -> None:
    """Check that it is Unsloth that trains.

    Raises:
        BackendError: model or trainer are not Unsloth's.
    """
    wrong = []
    files = [inspect.getfile(c.__init__) for c in type(trainer).__mro__ if inspect.isfunction(c.__init__)]
    if not any("unsloth" in file.lower() for file in files):
        wrong.append("the trainer is TRL's own")
    if not hasattr(trainer.model, "for_training"):
        wrong.append("the model was not loaded by it")
    _raise("was asked for and is not what trains", wrong)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _names(types: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types)) or "none"


def _raise(what: str, wrong: list[str]) -> None:
    if wrong:
        raise BackendError(
            f"Unsloth {what}: {'; '.join(wrong)}", hint="change the options, or train with --backend hf"
        )
