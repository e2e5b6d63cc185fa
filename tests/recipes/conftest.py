"""Run a recipe inside the test's process, as the command line would."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def defaults_file(folder: Path, tiny_model: Path, chat_data: dict[str, Path]) -> Path:
    values = {
        "model": str(tiny_model),
        "data": str(chat_data["train"]),
        "eval_data": str(chat_data["valid"]),
        "max_length": 160,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lora_r": 4,
        "learning_rate": 1e-2,
    }
    path = folder / "defaults.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def train(tmp_path, tiny_model, chat_data, capsys):
    """train("--max-steps", 2, …) → status, output, error text and the run directory."""

    def run(*options: object, defaults: bool = True, output_dir: Path | None = None) -> SimpleNamespace:
        from toolkit.cli.train import run_recipe

        output_dir = output_dir or tmp_path / "run"
        argv: list[object] = ["--output-dir", output_dir, "--cpu"]
        if defaults:  # in a file, so that a test's flags win over them
            argv += ["--config", defaults_file(tmp_path, tiny_model, chat_data)]
        capsys.readouterr()
        status = run_recipe("centralized-hf", [str(a) for a in [*argv, *options]])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err, folder=output_dir)

    return run


@pytest.fixture
def history():
    def read(folder: Path) -> dict:
        return json.loads((folder / "training_history.json").read_text())

    return read
