import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli.train import RUNS, run_recipe
from toolkit.config.load import load
from toolkit.config.recipes import RECIPES, CentralizedConfig
from toolkit.errors import Interrupted, NonFiniteLossError

ROOT = Path(__file__).parents[2]
COMPLETE = ["--model", "m", "--data", "org/name", "--output-dir", "o", "--cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "LOCAL_RANK", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def recipe_run(monkeypatch):
    """Replace what a recipe does once it has begun; importing the real thing brings torch."""
    calls = []

    def install(action):
        import types

        module = types.ModuleType("toolkit.rounds.centralized")

        def run(config, plan):
            calls.append((config, plan))
            return action(config, plan)

        module.run = run
        monkeypatch.setitem(sys.modules, "toolkit.rounds.centralized", module)
        monkeypatch.setattr("os.environ", dict(os.environ))
        return calls

    return install


def test_every_recipe_has_a_module_that_runs_it():
    assert RUNS.keys() == RECIPES.keys()
    assert [name for name in RUNS.values() if importlib.util.find_spec(name) is None] == []
    assert [n for n in RECIPES if not (ROOT / "recipes" / f"{n.replace('-', '_')}.py").is_file()] == []


def test_print_config_is_a_configuration(capsys):
    assert run_recipe("centralized-hf", [*COMPLETE, "--lora-r", "8", "--print-config"]) == 0
    text = capsys.readouterr().out
    Path("printed.yaml").write_text(text)
    again = load(CentralizedConfig, ["--config", "printed.yaml"]).config
    assert again == load(CentralizedConfig, [*COMPLETE, "--lora-r", "8"]).config
    assert not Path("o").exists()


def test_dry_run_shows_the_plan_and_the_command_and_starts_nothing(capsys, recipe_run):
    calls = recipe_run(lambda config, plan: 0)
    assert run_recipe("centralized-hf", [*COMPLETE, "--num-processes", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "lora_r: 16 " in text
    assert "num_processes: 2" in text
    command = next(line for line in text.splitlines() if "accelerate launch" in line)
    assert "--num_processes 2" in command
    assert "centralized-hf --model m --data org/name" in command
    assert "--dry-run" not in command
    assert calls == []
    assert list(Path.cwd().iterdir()) == []


def test_dry_run_finds_missing_files(capsys):
    Path("train.jsonl").write_text("{}")
    files = ["--model", "./nowhere", "--data", "train.json", "--chat-template", "t"]
    assert run_recipe("centralized-hf", [*files, "--output-dir", "o", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "data: there is no train.json; did you mean 'train.jsonl'?" in message
    assert "model: there is no ./nowhere" in message
    assert "chat_template: there is no t" in message


def test_the_guides_command_without_data_says_how_to_get_some(capsys):
    assert run_recipe("centralized-hf", []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: data: there is no data/train.json")
    assert "eval_data: there is no data/valid.json" in message
    assert "hint: meldkit data samples" in message


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_tracker_that_is_not_installed_is_said_before_anything_starts(
    recipe_run, capsys, monkeypatch, more
):
    Path("wandb").mkdir()  # a folder that W&B itself leaves behind is no package
    monkeypatch.syspath_prepend(".")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (
            importlib.machinery.PathFinder.find_spec(name, ["."]) if name == "wandb" else found(name)
        ),
    )
    calls = recipe_run(lambda config, plan: 0)
    assert run_recipe("centralized-hf", [*COMPLETE, "--report-to", "tensorboard,wandb", *more]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --report-to wandb needs the package wandb, which is not installed")
    assert 'pip install "meldkit[report]"' in message
    assert calls == []


def test_a_run_gets_the_configuration_and_the_plan(recipe_run):
    calls = recipe_run(lambda config, plan: 0)
    assert run_recipe("centralized-hf", [*COMPLETE, "--lora-r", "8"]) == 0
    [(config, plan)] = calls
    assert (config.lora_r, plan.num_processes, plan.device) == (8, 1, "cpu")


def test_the_environment_of_the_plan_is_set_before_the_run(recipe_run):
    seen = {}
    recipe_run(lambda config, plan: seen.update(os.environ) or 0)
    run_recipe("centralized-hf", COMPLETE)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_save_config(recipe_run, capsys):
    calls = recipe_run(lambda config, plan: 0)
    assert run_recipe("centralized-hf", [*COMPLETE, "--save-config", "--dry-run"]) == 0
    saved = json.loads(Path("o/experiment_config.json").read_text())
    assert (saved["model"], saved["lora_r"]) == ("m", 16)
    assert calls == []
    saved_file = ["--config", "o/experiment_config.json"]
    assert run_recipe("centralized-hf", [*saved_file, "--save-config", "c.yaml"]) == 0
    assert len(calls) == 1
    assert load(CentralizedConfig, ["--config", "c.yaml"]).config == calls[0][0]
    # A run directory has its own configuration, which nobody may replace.
    Path("o/journal.jsonl").write_text("")
    capsys.readouterr()
    assert run_recipe("centralized-hf", [*COMPLETE, "--save-config", "--dry-run", "--lora-r", "8"]) == 2
    assert "o holds a run" in capsys.readouterr().err
    assert json.loads(Path("o/experiment_config.json").read_text()) == saved


def test_samples_are_made_before_a_run_begins_and_said(recipe_run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "cache"))
    found = []

    def look(config, plan):
        found.extend(sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("cache/*/*")))
        return 0

    recipe_run(look)
    samples = ["--model", "sample:tiny-xlm-r", "--data", "sample:intents:sq-AL"]
    assert run_recipe("centralized-hf", [*COMPLETE[4:], *samples]) == 0
    assert found == ["cache/data/intents-sq-AL", "cache/models/tiny-xlm-r"]
    assert "Writing tiny-xlm-r ..." in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_a_file(recipe_run, capsys):
    def fail(config, plan):
        raise RuntimeError("it broke\nbadly")

    recipe_run(fail)
    assert run_recipe("centralized-hf", COMPLETE) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: RuntimeError: it broke badly\n  hint: the traceback is in ")
    path = Path(message.split("the traceback is in ")[1].split(";")[0])
    assert "Traceback" in path.read_text()
    path.unlink()


def test_the_traceback_goes_to_the_log_of_the_run(recipe_run, capsys):
    def fail(config, plan):
        Path("o").mkdir()
        Path("o/training.log").write_text("first line\n")
        raise RuntimeError("it broke")

    recipe_run(fail)
    assert run_recipe("centralized-hf", COMPLETE) == 1
    assert "the traceback is in o/training.log" in capsys.readouterr().err
    log = Path("o/training.log").read_text()
    assert log.startswith("first line\n")
    assert "RuntimeError: it broke" in log


def test_debug_shows_the_traceback(recipe_run, capsys):
    def fail(config, plan):
        raise NonFiniteLossError("the loss is nan", hint="a smaller --learning-rate")

    recipe_run(fail)
    assert run_recipe("centralized-hf", COMPLETE) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n  hint: a smaller --learning-rate\n"
    assert run_recipe("centralized-hf", [*COMPLETE, "--debug"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    assert "error: the loss is nan" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_75_and_says_how_to_go_on(recipe_run, capsys, number):
    def wait(config, plan):
        Path("o").mkdir()
        Path("o/experiment_config.json").write_text("{}")
        signal.raise_signal(number)
        return 0

    recipe_run(wait)
    assert run_recipe("centralized-hf", COMPLETE) == 75
    message = capsys.readouterr().err
    assert message.startswith(f"interrupted: {number.name}")
    assert "meldkit train centralized-hf --resume --output-dir o" in message


def test_a_run_that_stopped_itself_ends_with_75(recipe_run, capsys):
    def stop(config, plan):
        raise Interrupted("interrupted by SIGINT after step 3", hint="continue with: ...")

    recipe_run(stop)
    assert run_recipe("centralized-hf", COMPLETE) == 75
    assert capsys.readouterr().err == "interrupted: by SIGINT after step 3\n  hint: continue with: ...\n"


def test_only_the_first_rank_reports_wrong_options(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert run_recipe("centralized-hf", ["--lora-r", "0"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run_recipe("centralized-hf", ["--lora-r", "0"]) == 2
    assert "lora-r" in capsys.readouterr().err


def test_the_recipe_file_is_the_same_command(meldkit, tmp_path):
    argv = [*COMPLETE, "--print-config"]
    script = subprocess.run(
        [sys.executable, ROOT / "recipes" / "centralized_hf.py", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    assert script.stdout == meldkit("train", "centralized-hf", *argv).stdout
