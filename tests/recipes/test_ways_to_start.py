"""Every way to start a recipe does the same and records the same plan; several processes are one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# `accelerate launch` sets a number of threads of its own, over what the user's environment says.
ENVIRONMENT.pop("OMP_NUM_THREADS", None)


@pytest.fixture
def start(tmp_path, tiny_model, chat_data):
    """start(command words, name, options…) → the run directory."""

    def run(command: list[str], name: str, *options: object) -> Path:
        folder = tmp_path / name
        words = ["--model", tiny_model, "--data", chat_data["train"], "--eval-data", chat_data["valid"]]
        words += ["--max-length", 160, "--max-steps", 4, "--lora-r", 4, "--learning-rate", "1e-2"]
        words += ["--output-dir", folder, *options]
        result = subprocess.run(
            [*command, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env=ENVIRONMENT,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return folder

    return run


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "training_history.json").read_text())["steps"]]


def plan(folder: Path) -> dict:
    return json.loads((folder / "environment.json").read_text())["plan"]


def test_four_ways_one_plan(start):
    python = sys.executable
    recipe = str(ROOT / "recipes" / "centralized_hf.py")
    script = str(ROOT / "scripts" / "run_centralized.sh")
    small = ("--batch-size", 2, "--gradient-accumulation-steps", 2)
    folders = [
        start([python, "-m", "toolkit", "train", "centralized-hf"], "meldkit", *small),
        start([python, recipe], "python", *small),
        start([python, "-m", "accelerate.commands.launch", recipe], "accelerate", *small),
        start(["bash", script, "--framework", "hf", "--gpu", "0"], "script", *small),
    ]
    first = folders[0]
    for folder in folders[1:]:
        assert losses(folder) == losses(first), folder.name
        assert plan(folder) == plan(first), folder.name


def test_two_processes_follow_the_curve_of_one(start):
    """Two processes of two rows see the rows of one process that accumulates twice two; sums of floats in another
    order differ in the last bits, and the optimizer amplifies that: 1e-4 after four steps."""
    command = [sys.executable, "-m", "toolkit", "train", "centralized-hf"]
    one = start(command, "one", "--batch-size", 2, "--gradient-accumulation-steps", 2)
    two = start(command, "two", "--batch-size", 2, "--gradient-accumulation-steps", 1, "--num-processes", 2)
    assert plan(two)["num_processes"] == 2
    environment = json.loads((two / "environment.json").read_text())
    assert environment["num_processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    histories = [json.loads((f / "training_history.json").read_text()) for f in (one, two)]
    assert histories[0]["steps"][-1]["total_tokens"] == histories[1]["steps"][-1]["total_tokens"]
    for a, b in zip(*(h["evaluations"] for h in histories), strict=True):
        assert a["metrics"]["num_tokens"] == b["metrics"]["num_tokens"]
        assert a["metrics"]["loss"] == pytest.approx(b["metrics"]["loss"], abs=1e-4)
