"""Every way to start a recipe does the same and records the same plan; several processes are one run."""

import json
import os
import shutil
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

    def run(command: list[str], name: str, *options: object, base: list[object] | None = None) -> Path:
        folder = tmp_path / name
        language_model = [
            "--model",
            tiny_model,
            "--data",
            chat_data["train"],
            "--eval-data",
            chat_data["valid"],
        ]
        language_model += ["--max-length", 160, "--lora-r", 4, "--learning-rate", "1e-2"]
        language_model += ["--mixed-precision", "no"]
        words = [*(base or language_model), "--output-dir", folder, *options]
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


def forget_after(folder: Path, step: int) -> None:
    """As if the run had been killed right after its checkpoint of that step."""
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    cut = next(i for i, r in enumerate(records) if r["event"] == "checkpoint" and r["step"] == step)
    (folder / "journal.jsonl").write_text("".join(lines[: cut + 1]))
    shutil.rmtree(folder / "final_model")


def test_four_ways_one_plan(start):
    python = sys.executable
    recipe = str(ROOT / "recipes" / "centralized_hf.py")
    script = str(ROOT / "scripts" / "run_centralized.sh")
    small = ("--max-steps", 4, "--batch-size", 2, "--gradient-accumulation-steps", 2)
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
    common = ("--max-steps", 4, "--batch-size", 2)
    one = start(command, "one", *common, "--gradient-accumulation-steps", 2)
    two = start(command, "two", *common, "--gradient-accumulation-steps", 1, "--num-processes", 2)
    assert plan(two)["num_processes"] == 2
    environment = json.loads((two / "environment.json").read_text())
    assert environment["num_processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    histories = [json.loads((f / "training_history.json").read_text()) for f in (one, two)]
    assert histories[0]["steps"][-1]["total_tokens"] == histories[1]["steps"][-1]["total_tokens"]
    for a, b in zip(*(h["evaluations"] for h in histories), strict=True):
        assert a["metrics"]["num_tokens"] == b["metrics"]["num_tokens"]
        assert a["metrics"]["loss"] == pytest.approx(b["metrics"]["loss"], abs=1e-4)


@pytest.mark.faults
def test_two_processes_interrupted_in_the_second_epoch_and_resumed(start):
    """The rows of the rest of the epoch are those of that epoch, on both processes."""
    command = [sys.executable, "-m", "toolkit", "train", "centralized-hf"]
    options = ["--batch-size", 2, "--gradient-accumulation-steps", 1, "--num-processes", 2, "--max-steps", 10]
    options += ["--lora-dropout", 0.1, "--checkpoint-every", 8]
    whole = start(command, "whole", *options)
    part = start(command, "part", *options)
    forget_after(part, 8)
    start(command, "part", *options, "--resume")
    assert losses(part) == losses(whole)
    weights = "final_model/adapter_model.safetensors"
    assert (part / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.fixture
def classification(tmp_path) -> list[object]:
    """Options that train a tiny encoder without dropout on two classes."""
    from toolkit.modeling.samples import make

    model = make("tiny-xlm-r", tmp_path / "encoder")
    settings = json.loads((model / "config.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    (model / "config.json").write_text(json.dumps(settings | off))
    rows = [{"text": f"{word} number {i}", "label": word} for i in range(12) for word in ("lamp", "jazz")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "sequence-classification", "--model", model, "--data", data, "--eval-fraction", 0.25]
    return [*options, "--max-length", 64, "--lora-r", 4, "--learning-rate", "1e-2"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_deepspeed_follows_the_curve_of_one_process(start, classification, stage, task):
    command = [sys.executable, "-m", "toolkit", "train", "centralized-hf"]
    base = None if task == "causal-lm" else classification
    common = ("--max-steps", 4, "--batch-size", 2)
    one = start(command, "one", *common, "--gradient-accumulation-steps", 2, base=base)
    sharded = ("--num-processes", 2, "--deepspeed", stage, "--gradient-accumulation-steps", 1)
    two = start(command, "two", *common, *sharded, base=base)
    assert plan(two)["deepspeed"] == stage
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert (two / "final_model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_resumes(start, stage):
    command = [sys.executable, "-m", "toolkit", "train", "centralized-hf"]
    options = [
        "--max-steps",
        10,
        "--batch-size",
        2,
        "--gradient-accumulation-steps",
        1,
        "--checkpoint-every",
        8,
    ]
    options += ["--num-processes", 2, "--deepspeed", stage]
    whole, part = start(command, "whole", *options), start(command, "part", *options)
    forget_after(part, 8)
    start(command, "part", *options, "--resume")
    assert losses(part) == losses(whole)
