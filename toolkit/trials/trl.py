"""The arm trl: a bare TRL script, as its documentation writes one."""

from typing import Any

from toolkit.trials.equal_settings import EqualSettings
from toolkit.trials.probe import Probe


def run(spec: dict[str, Any]) -> None:
    """Train by the specification and measure it."""
    probe = Probe(spec)
    settings = EqualSettings(spec)
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    arguments: dict[str, Any] = settings.training_arguments() | {"max_length": settings.config.max_length}
    if settings.config.packing:
        arguments["packing"] = True
    if keywords := settings.model_keywords():
        arguments["model_init_kwargs"] = keywords
    trainer = SFTTrainer(
        settings.model_path(),
        args=SFTConfig(**arguments),
        train_dataset=settings.rows(),
        peft_config=settings.peft_config(),
    )
    probe.attach(trainer)
    trainer.train()
    probe.finish()
