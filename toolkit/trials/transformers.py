"""The arm transformers: a bare script with Trainer and PEFT, without TRL."""

from typing import Any

from toolkit.errors import InputError
from toolkit.trials.equal_settings import EqualSettings
from toolkit.trials.probe import Probe


def run(spec: dict[str, Any]) -> None:
    """Train by the specification and measure it."""
    probe = Probe(spec)
    settings = EqualSettings(spec)
    if settings.config.packing:
        raise InputError("a bare script with transformers' Trainer is not written for --packing")
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(settings.model_path())
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model_path(), **settings.model_keywords())
    adapter = settings.peft_config()
    if adapter is not None:
        if settings.config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, adapter)
    rows = settings.rows()
    length = settings.config.max_length

    def tokenize(row: Any) -> dict[str, Any]:
        if "messages" in row:
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        else:
            ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": ids[:length], "labels": ids[:length]}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings.training_arguments()),
        train_dataset=rows.map(tokenize, remove_columns=rows.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    probe.attach(trainer)
    trainer.train()
    probe.finish()
