"""The workload's settings as arguments of bare scripts: what a careful user would write to get the same training."""

from pathlib import Path
from typing import Any

from toolkit.errors import InputError
from toolkit.trials.meldkit import config_of

_ARGUMENTS = {
    "max_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optim",
    "gradient_checkpointing": "gradient_checkpointing",
    "seed": "seed",
}
"""Our options that have one counterpart in TrainingArguments."""


class EqualSettings:
    """What a bare script needs for the workload.

    Args:
        spec: of the trial.

    Attributes:
        config, plan: the recipe's configuration of the workload, and the launch plan for it.
        left: options that stay at the library's defaults.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from toolkit.launch.plan import resolve_plan

        arm = spec["arm"]
        extra = dict(arm["options"])
        self.trainer_args = extra.pop("trainer_args", {})
        self.config = config_of(spec["settings"], extra, Path(spec["folder"]))
        self.plan = resolve_plan(self.config)
        self.left = set(arm["left_at_defaults"])
        if self.config.optim == "auto":
            self.left.add("optim")  # a word of ours; theirs is AdamW, fused, too
        if self.config.gradient_checkpointing is None:
            self.left.add("gradient_checkpointing")  # nobody asked for either
        self._refuse()

    def training_arguments(self) -> dict[str, Any]:
        """Arguments of TrainingArguments and its subclasses."""
        config = self.config
        values = {
            theirs: getattr(config, ours) for ours, theirs in _ARGUMENTS.items() if ours not in self.left
        }
        values |= {"output_dir": config.output_dir, "report_to": "none", "save_strategy": "no"}
        values["use_cpu"] = self.plan.device == "cpu"
        if "mixed_precision" not in self.left:
            values |= {name: self.plan.mixed_precision == name for name in ("bf16", "fp16")}
        if values.get("gradient_checkpointing"):
            values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        if config.length_grouping:
            values["train_sampling_strategy"] = "group_by_length"
        return values | {"logging_steps": 1} | self.trainer_args

    def model_keywords(self) -> dict[str, Any]:
        """Keywords of ``from_pretrained``."""
        from toolkit.modeling.load import base_dtype, quantization_config

        config, keywords = self.config, {}
        if "dtype" not in self.left:
            keywords["dtype"] = base_dtype(config, self.plan)
        if "attn_implementation" not in self.left and config.attn_implementation != "auto":
            keywords["attn_implementation"] = config.attn_implementation
        quantization = quantization_config(config, self.plan)
        if quantization is not None:
            keywords["quantization_config"] = quantization
        return keywords

    def model_path(self) -> str:
        from toolkit.modeling.source import find_model

        return find_model(self.config.model).name

    def peft_config(self) -> Any:
        """The adapter's configuration, None for full fine-tuning."""
        from peft import LoraConfig

        config = self.config
        if config.finetuning == "full":
            return None
        return LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT divides it; a float is fine
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        )

    def rows(self) -> Any:
        """The training rows as ``datasets`` reads them."""
        from datasets import load_dataset

        return load_dataset("json", data_files=self.config.data, split="train")

    def _refuse(self) -> None:
        config = self.config
        wrong = {
            "--task": config.task != "causal-lm",
            "--loss-on other than all": config.loss_on != "all",
            "--overlong other than truncate": config.overlong not in ("truncate", "error"),
            "--lora-modules-to-save": bool(config.lora_modules_to_save),
            "--chat-template": config.chat_template is not None,
        }
        named = [option for option, is_asked in wrong.items() if is_asked]
        if named:
            raise InputError(f"a bare script is not written for {', '.join(named)}")
