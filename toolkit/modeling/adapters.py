"""LoRA adapters on a base model."""

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from toolkit.errors import ModelError


def add_adapter(model: Any, config: Any, *, name: str = "default", autocast_dtype: bool = True) -> PeftModel:
    """Put a new LoRA adapter on ``model`` and make it the active one.

    Args:
        model: a base, or a PeftModel that already carries adapters of other participants.
        config: the recipe's options (AdapterOptions, ``task``).
        name: the adapter's name.
        autocast_dtype: hold the adapter in float32 whatever the base's type. False under ZeRO-3, which gathers
            tensors of one type only.

    Raises:
        ModelError: ``--lora-target-modules`` matches nothing; the message lists what there is. Or ``name`` is one
            that PEFT cannot hold beside the names of the model's own modules.
    """
    _check_name(model, name)
    lora = lora_config(model, config)
    if isinstance(model, PeftModel):
        model.add_adapter(name, lora, autocast_adapter_dtype=autocast_dtype)
        model.set_adapter(name)
        return model
    return get_peft_model(model, lora, adapter_name=name, autocast_adapter_dtype=autocast_dtype)


def lora_config(model: Any, config: Any) -> LoraConfig:
    """PEFT's configuration of the adapter (Hu et al. 2021, arXiv:2106.09685)."""
    targets = config.lora_target_modules
    if isinstance(targets, list) and len(targets) == 1 and targets[0] == "all-linear":
        targets = "all-linear"
    _check_targets(model, targets)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if config.task == "sequence-classification" else TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=list(config.lora_modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )


def target_modules(base: Any, targets: str | list[str]) -> list[str]:
    """Names of the linear layers of a language model that get an adapter, as PEFT chooses them.

    Args:
        base: without adapters.
        targets: all-linear (all but the output layer), endings of names, or a regular expression.
    """
    head = base.get_output_embeddings()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and (targets != "all-linear" or module is not head)
    ]
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        return [name for name in linear if re.fullmatch(targets, name)]
    return [name for name in linear if any(_is_called(name, target) for target in targets)]


def _is_called(path: str, name: str) -> bool:
    """Whether a module's path is ``name`` or ends with it."""
    return path == name or path.endswith(f".{name}")


def _check_name(model: Any, name: str) -> None:
    """PEFT finds an adapter's tensors by its name between dots, and keeps them in a ModuleDict."""
    own = {part for module, _ in model.named_parameters() for part in module.split(".")}
    taken = isinstance(model, PeftModel) and name in model.peft_config
    if taken or name in own or "." in name or not name or hasattr(torch.nn.ModuleDict(), name):
        raise ModelError(
            f"an adapter cannot have the name {name!r}",
            hint="give one without a dot that is none of the model's modules, torch's methods and other adapters",
        )
    if "lora_" in name:
        raise ModelError(
            f"an adapter cannot have the name {name!r}, which contains PEFT's own prefix 'lora_'"
        )


def _check_targets(model: Any, targets: str | list[str]) -> None:
    if targets == "all-linear":
        return
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if "lora_" not in name})
    wanted = [targets] if isinstance(targets, str) else targets
    if isinstance(targets, str):
        try:
            unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise ModelError(
                f"--lora-target-modules {targets!r} is not a regular expression: {error}"
            ) from error
    else:
        unmatched = [w for w in wanted if not any(_is_called(name, w) for name in names)]
    if unmatched:
        raise ModelError(
            f"--lora-target-modules: no linear layer of the model matches {', '.join(unmatched)}",
            hint=f"the model's linear layers are named {', '.join(endings)}; all-linear takes all but the head",
        )
