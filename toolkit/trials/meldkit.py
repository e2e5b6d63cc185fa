"""The program of the arms hf and unsloth: the recipe itself, as ``meldkit train`` runs it."""

from pathlib import Path
from typing import Any

from toolkit.cli.train import run_config
from toolkit.config.recipes import CentralizedConfig
from toolkit.errors import RunError
from toolkit.trials.probe import Probe

RECIPE = "centralized-hf"
_QUIET = {"eval_every": "never", "checkpoint_every": "never", "report_to": [], "skip_data_check": True}


def config_of(settings: dict[str, Any], options: dict[str, Any], output_dir: Path) -> CentralizedConfig:
    """The recipe's configuration: the workload's settings, what the arm changes, and nothing saved on the way."""
    known = CentralizedConfig.model_fields
    values = {name: value for name, value in settings.items() if name in known}
    return CentralizedConfig.model_validate(values | _QUIET | options | {"output_dir": str(output_dir)})


def run(spec: dict[str, Any]) -> None:
    """Train by the specification and measure it."""
    probe = Probe(spec)
    config = config_of(spec["settings"], spec["arm"]["options"], Path(spec["folder"]) / "run")
    status = run_config(RECIPE, config, on_trainer=lambda trainer: probe.attach(trainer.underlying))
    if status != 0:
        raise RunError(f"the recipe ended with status {status}")
    probe.finish()
