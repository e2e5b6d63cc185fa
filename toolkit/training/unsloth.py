"""The Unsloth backend: the run of the Hugging Face backend, with Unsloth's model, adapter and trainer.

Unsloth replaces ``trl.SFTTrainer`` while it is imported (``unsloth_process.py``), so that everything of the other
backend that is built on that class trains with Unsloth here: the order of the rows, the masks, counts, pauses,
checkpoints. Unsloth itself is used through its documented API only.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from toolkit.errors import ModelError
from toolkit.modeling.adapters import add_adapter, lora_config, target_modules
from toolkit.modeling.load import base_dtype, load_model_config, quantization_config
from toolkit.modeling.source import find_model
from toolkit.training.arguments import asked_arguments
from toolkit.training.contract import TrainerSetup, trainer_backend
from toolkit.training.hf import HFTrainer
from toolkit.training.unsloth_checks import check_adapter, check_arguments, check_base, check_trainer
from toolkit.training.unsloth_process import into_the_log

_FIRST = "default"
"""Name of the adapter with which Unsloth prepares a base."""


class UnslothTrainer(HFTrainer):
    """A :class:`~toolkit.training.contract.ParticipantTrainer` on Unsloth's SFTTrainer."""

    def __init__(self, setup: TrainerSetup) -> None:
        # Unsloth has set up its own checkpointing of activations on the model; the Trainer would replace it.
        config = setup.config.model_copy(update={"gradient_checkpointing": False})
        with into_the_log():
            super().__init__(dataclasses.replace(setup, config=config))
        check_trainer(self._trainer)
        asked = asked_arguments(config, setup.world, setup.staging, seed=setup.seed)
        self.notes = check_arguments(asked, self._trainer.args)


@trainer_backend("unsloth")
class UnslothBackend:
    """Unsloth's FastLanguageModel. The process has entered Unsloth before (``enter_unsloth``)."""

    build_trainer = UnslothTrainer

    def load_base(
        self,
        config: Any,
        plan: Any,
        *,
        label_names: list[str] | None = None,
        pad_token_id: int | None = None,
        local_rank: int = 0,
    ) -> Any:
        """As :func:`toolkit.modeling.load.load_base`.

        Raises:
            ModelError: it cannot be loaded, or Unsloth cannot load such a one.
            BackendError: Unsloth loaded something else.
        """
        assert label_names is None, "the configuration refuses classifiers"
        source = find_model(config.model)
        if source.gguf_file is not None:
            raise ModelError(f"{config.model}: Unsloth does not train GGUF files", hint="--backend hf does")
        quantization = quantization_config(config, plan)
        dtype = _dtype(config, plan)
        keywords: dict[str, Any] = {
            "model_name": source.name,
            "use_exact_model_name": True,  # else another model than the one named, from Unsloth's own account
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
            "max_seq_length": config.max_length,
            "dtype": dtype,
            "load_in_4bit": config.load_in_4bit,
            "load_in_8bit": config.load_in_8bit,
            "full_finetuning": config.finetuning == "full",
            "use_gradient_checkpointing": _checkpointing(config),
            "random_state": config.seed,
        }
        if config.attn_implementation != "auto" or plan.device == "cpu":
            keywords["attn_implementation"] = config.attn_implementation.replace("auto", "sdpa")
        if plan.device == "cuda":
            keywords["device_map"] = {"": local_rank}
            if quantization is not None:
                keywords["quantization_config"] = quantization
            if config.finetuning == "full" and dtype == torch.float32:
                keywords["float32_mixed_precision"] = True
        model, _ = _ask(f"{source.name} cannot be loaded", _fast_language_model().from_pretrained, **keywords)
        model.config.use_cache = False
        if model.config.pad_token_id is None:
            model.config.pad_token_id = pad_token_id
        check_base(model, dtype, quantization)
        return model

    def add_adapter(
        self, model: Any, config: Any, *, name: str = "default", autocast_dtype: bool = True
    ) -> Any:
        """As :func:`toolkit.modeling.adapters.add_adapter`; the first one makes the base Unsloth's.

        Raises:
            ModelError: as there, or Unsloth cannot have such an adapter.
            BackendError: Unsloth made another.
        """
        if isinstance(model, PeftModel):
            return add_adapter(model, config, name=name, autocast_dtype=autocast_dtype)
        asked = lora_config(model, config)
        modules = set(target_modules(model, config.lora_target_modules))
        model = _ask(
            "no adapter can be made",
            _fast_language_model().get_peft_model,
            model=model,
            r=config.lora_r,
            target_modules=sorted({path.rsplit(".", 1)[-1] for path in modules}),
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias="none",
            use_gradient_checkpointing=_checkpointing(config),
            random_state=config.seed,
            use_rslora=config.use_rslora,
            modules_to_save=list(config.lora_modules_to_save) or None,
            **({"use_dora": True} if config.use_dora else {}),
        )
        check_adapter(model, _FIRST, asked, modules)
        if name != _FIRST:
            torch.manual_seed(
                config.seed
            )  # as the first one began: all participants start from the same weights
            model = add_adapter(model, config, name=name, autocast_dtype=autocast_dtype)
            model.delete_adapter(_FIRST)
        return model


def _fast_language_model() -> Any:
    return importlib.import_module("unsloth").FastLanguageModel


def _checkpointing(config: Any) -> str | bool:
    return False if config.gradient_checkpointing is False else "unsloth"


def _dtype(config: Any, plan: Any) -> torch.dtype:
    dtype = base_dtype(config, plan)
    if dtype != "auto":
        return dtype
    own = getattr(load_model_config(config).get_text_config(), "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


def _ask(what: str, function: Callable[..., Any], **keywords: Any) -> Any:
    """Call Unsloth. It stops with exceptions of all kinds over what it does not know."""
    try:
        with into_the_log():
            return function(**keywords)
    except (OSError, ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"Unsloth: {what}: {first_line}", hint="--backend hf may know it") from error
