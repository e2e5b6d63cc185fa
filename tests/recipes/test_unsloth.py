"""The Unsloth backend, for real: the same run as with Hugging Face's, or an error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("unsloth_runs.py")
TOLERANCE = 1e-5
"""Of losses and weights. Unsloth takes the fused AdamW and its own cross-entropy in blocks: other roundings of float32,
which Adam magnifies where a gradient is next to nothing (1.5e-6 was seen). A step moves a weight by 1e-2."""

SAME = {
    "lora": ["--lora-dropout", "0.1", "--merge-final", "--lora-target-modules", "q_proj,v_proj,down_proj"],
    "full": ["--finetuning", "full", "--no-gradient-checkpointing"],
    "4 bits": ["--load-in-4bit", "--use-rslora", "--sample-prompts", "red"],
    "dora": ["--use-dora", "--length-grouping", "--optim", "adamw_torch_fused"],
    "packing": ["--packing", "--mixed-precision", "bf16", "--dtype", "float32"],
}
"""Runs that both backends can do: they have to be the same."""

REFUSED = {
    "8 bits": (["--load-in-8bit"], "8 bits were asked for, and no layer has them"),
    "fp4": (["--load-in-4bit", "--quant-type", "fp4"], "bnb_4bit_quant_type is nf4, and fp4 was asked for"),
    "not nested": (
        ["--load-in-4bit", "--no-nested-quant"],
        "bnb_4bit_use_double_quant is True, and False was asked for",
    ),
    "optimizer": (["--optim", "adamw_8bit"], "optim is adamw_torch_fused, and adamw_8bit was asked for"),
    "head": (
        ["--lora-target-modules", "q_proj,lm_head"],
        "modules_to_save is ['lm_head'], and [] was asked for",
    ),
    "pattern": (["--lora-target-modules", r".*layers\.0.*q_proj"], "also on model.layers.1.self_attn.q_proj"),
    "half": (["--dtype", "float16"], "its weights are bfloat16, and float16 was asked for"),
}
"""What Unsloth would do otherwise on a CPU, with a printed line at most."""


def arguments(folder: Path, tiny_model: Path, chat_data: dict[str, Path], *options: str) -> list[str]:
    given = ["--model", tiny_model, "--data", chat_data["train"], "--eval-data", chat_data["valid"], "--cpu"]
    given += ["--output-dir", folder, "--max-length", 160, "--batch-size", 4, "--lora-r", 4]
    given += ["--gradient-accumulation-steps", 2, "--learning-rate", "1e-2", "--max-epochs", 1]
    if "full" in options:
        del given[given.index("--lora-r") : given.index("--lora-r") + 2]
    given += [
        "--throughput",
        "off",
    ]  # dropout falls otherwise where rows lie otherwise, and bf16 is no tight ground
    return [str(word) for word in [*given, *options]]


def iterative(folder: Path, tiny_model: Path, chat_data: dict[str, Path], backend: str) -> list[str]:
    given = [
        "--task",
        "causal-lm",
        "--model",
        tiny_model,
        "--data",
        chat_data["train"].with_name("{locale}.jsonl"),
    ]
    given += [
        "--locales",
        "en-US,fr-FR",
        "--cpu",
        "--output-dir",
        folder,
        "--max-length",
        160,
        "--batch-size",
        8,
        "--throughput",
        "off",
    ]
    given += ["--eval-fraction", 0.25, "--max-epochs", 2, "--merge-frequency", 1, "--learning-rate", "1e-2"]
    return [str(word) for word in [*given, "--no-baselines", "--lora-r", 4, "--backend", backend]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, chat_data) -> SimpleNamespace:
    """All runs with Unsloth, in one process of their own, and the folders that they wrote."""
    folder = tmp_path_factory.mktemp("unsloth")
    rows = chat_data["train"].read_text().splitlines(keepends=True)
    for locale, turn in (("en-US", 1), ("fr-FR", -1)):
        chat_data["train"].with_name(f"{locale}.jsonl").write_text("".join(rows[::turn]))
    tasks: dict[str, Any] = {}
    for name, options in [*SAME.items(), *((name, options) for name, (options, _) in REFUSED.items())]:
        argv = arguments(folder / name, tiny_model, chat_data, *options)
        tasks[name] = {"recipe": "centralized-unsloth", "argv": argv}
    tasks["by option"] = {
        "recipe": "centralized-hf",
        "argv": arguments(
            folder / "by option", tiny_model, chat_data, "--backend", "unsloth", "--max-steps", "1"
        ),
    }
    tasks["iterative"] = {
        "recipe": "iterative-merge",
        "argv": iterative(folder / "iterative", tiny_model, chat_data, "unsloth"),
    }
    (folder / "tasks.json").write_text(json.dumps({"runs": tasks, "out": str(folder / "results.json")}))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(folder / "tasks.json")], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    return SimpleNamespace(folder=folder, results=results, err=done.stderr, out=done.stdout)


def history(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_history.json").read_text())


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def files(folder: Path) -> set[str]:
    """Files of a run directory. TensorBoard puts the time into the names of its own."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path.parent if path.name.startswith("events.out") else path) for path in found}


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert (tensor - theirs[name]).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("name", SAME)
def test_the_same_run_as_with_hugging_face(runs, name, tmp_path, tiny_model, chat_data):
    from toolkit.cli.train import run_recipe

    assert runs.results[name]["status"] == 0, runs.results[name]["err"]
    ours, theirs = runs.folder / name, tmp_path / "hf"
    assert run_recipe("centralized-hf", arguments(theirs, tiny_model, chat_data, *SAME[name])) == 0
    one, other = history(ours), history(theirs)
    assert (one["recipe"], other["recipe"]) == ("centralized-unsloth", "centralized-hf")
    assert len(one["steps"]) == len(other["steps"]) >= 2
    for step, reference in zip(one["steps"], other["steps"], strict=True):
        for key in ("batch_digest", "num_tokens", "num_trainable_tokens", "learning_rate"):
            assert step[key] == reference[key], key
        assert step["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert other["steps"][0]["loss"] != pytest.approx(other["steps"][-1]["loss"], abs=1e-3)  # it has learned
    for evaluation, reference in zip(one["evaluations"], other["evaluations"], strict=True):
        assert evaluation["metrics"] == pytest.approx(reference["metrics"], rel=TOLERANCE)
    assert_same_weights(ours / "final_model", theirs / "final_model")
    assert files(ours) == files(theirs)
    if "--merge-final" in SAME[name]:
        assert_same_weights(ours / "final_model" / "merged", theirs / "final_model" / "merged")


def test_what_differs_by_rounding_is_said_and_recorded(runs):
    sentence = "Unsloth trains with --optim adamw_torch_fused in place of adamw_torch"
    assert sentence in runs.results["lora"]["out"] + runs.results["lora"]["err"]
    assert sentence in (runs.folder / "lora" / "training.log").read_text()
    assert sentence not in (runs.folder / "dora" / "training.log").read_text()  # which asked for it


@pytest.mark.parametrize("name", REFUSED)
def test_what_unsloth_would_do_otherwise_is_an_error(runs, name):
    result = runs.results[name]
    assert result["status"] == 1, result["out"]
    assert REFUSED[name][1] in result["err"]
    assert "--backend hf" in result["err"]
    assert not (runs.folder / name / "final_model").exists()


def test_the_backend_is_an_option_of_every_recipe(runs):
    assert "Backend: Unsloth 20" in runs.results["by option"]["out"]
    assert "Backend: Unsloth 20" in runs.results["iterative"]["out"]
    assert runs.results["by option"]["status"] == 0
    assert history(runs.folder / "by option")["recipe"] == "centralized-unsloth"


def test_it_speaks_into_the_log_only(runs):
    said = [runs.results[name]["out"] + runs.results[name]["err"] for name in (*SAME, "iterative")]
    assert not any("Unsloth (CPU)" in text or "[toolkit" in text for text in said)
    assert runs.results["root handlers"] == 0
    assert "Unsloth" not in runs.out
    assert "leaked" not in runs.err
    assert not (runs.folder / "unsloth_compiled_cache").exists()


def test_locales_that_merge(runs, tmp_path, tiny_model, chat_data):
    from toolkit.cli.train import run_recipe

    assert runs.results["iterative"]["status"] == 0, runs.results["iterative"]["err"]
    assert run_recipe("iterative-merge", iterative(tmp_path / "hf", tiny_model, chat_data, "hf")) == 0
    ours = runs.folder / "iterative"
    assert [merge["epoch"] for merge in history(ours)["merges"]] == [1, 2]
    for locale in ("en-US", "fr-FR"):
        assert_same_weights(ours / locale / "final_model", tmp_path / "hf" / locale / "final_model")
    assert "Unsloth trains with" in (ours / "iterative_training.log").read_text()


@pytest.mark.slow
def test_two_processes(tmp_path, tiny_model, chat_data, meldkit):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folders = {}
    for backend in ("hf", "unsloth"):
        folders[backend] = tmp_path / backend
        argv = arguments(
            folders[backend], tiny_model, chat_data, "--num-processes", "2", "--backend", backend
        )
        done = subprocess.run(
            [sys.executable, "-m", "toolkit", "train", "centralized-hf", *argv],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert_same_weights(folders["unsloth"] / "final_model", folders["hf"] / "final_model")


def test_the_script_trains_with_unsloth(tmp_path, tiny_model, chat_data):
    """From the shell, with everything that lies between; the run directory is one of any other run."""
    script = Path(__file__).parents[2] / "scripts" / "run_centralized.sh"
    argv = arguments(tmp_path / "run", tiny_model, chat_data, "--max-steps", "2")
    argv.remove("--cpu")
    done = subprocess.run(
        ["bash", str(script), "--framework", "unsloth", *argv],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final_model" / "adapter_model.safetensors").is_file()
    assert "Unsloth (CPU)" not in done.stdout + done.stderr
    assert "leaked" not in done.stderr
    versions = json.loads((tmp_path / "run" / "environment.json").read_text())["versions"]
    assert versions["unsloth"]
    assert versions["unsloth-zoo"]
