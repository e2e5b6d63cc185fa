"""What stands between a process and Unsloth; nothing here imports it."""

import importlib.metadata

import pytest

from toolkit.errors import BackendError, ConfigError, LaunchError, MissingDependencyError
from toolkit.training import unsloth_process


def test_an_installation_that_fits():
    unsloth_process.check_installation()


def test_unsloth_is_not_installed(monkeypatch):
    monkeypatch.setattr(unsloth_process, "is_installed", lambda module: False)
    with pytest.raises(MissingDependencyError, match="--backend unsloth needs the package unsloth"):
        unsloth_process.check_installation()


def test_a_package_of_a_version_that_unsloth_does_not_know(monkeypatch):
    true_version = importlib.metadata.version

    def version(name: str) -> str:
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.23.0" if name == "transformers" else true_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        LaunchError, match=r"asks for .*transformers.*\(here: 5\.23\.0\); trl.*\(here: missing\)"
    ):
        unsloth_process.check_installation()


def test_a_process_that_has_transformers_already(monkeypatch):
    import transformers  # noqa: F401 - the process of the tests has it or gets it here

    with pytest.raises(LaunchError, match=r"has imported .*transformers.*, and Unsloth has to come first"):
        unsloth_process.enter_unsloth("cpu")


def test_options_that_it_cannot_have():
    from toolkit.config.load import load
    from toolkit.config.recipes import RECIPES

    common = ["--model", "m", "--data", "d", "--output-dir", "o", "--backend", "unsloth"]
    with pytest.raises(ConfigError, match="trains language models"):
        load(RECIPES["centralized-hf"], [*common, "--task", "sequence-classification"])
    with pytest.raises(ConfigError, match=r"deepspeed.*is not for backend: unsloth"):
        load(RECIPES["centralized-hf"], [*common, "--deepspeed", "zero2"])


def test_a_trainer_that_is_not_unsloths_is_an_error(build, make_model, make_config):
    from toolkit.modeling.adapters import add_adapter
    from toolkit.training.unsloth_checks import check_trainer

    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    with pytest.raises(BackendError, match="trainer is TRL's own; the model was not loaded by it"):
        check_trainer(part.trainer._trainer)
