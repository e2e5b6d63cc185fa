import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli import help as texts
from toolkit.cli.main import main
from toolkit.config import option_help
from toolkit.config.recipes import RECIPES

ROOT = Path(__file__).parents[2]


def test_help_goes_to_stdout_and_nothing_else(meldkit):
    commands = (["train"], ["data"], ["train", "centralized-hf"], ["merge"], ["fisher"])
    for argv in (["--help"], *([*command, "--help"] for command in commands)):
        result = meldkit(*argv)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("usage: meldkit")
    assert "centralized-hf" in meldkit("train", "--help").stdout


def test_wrong_words_go_to_stderr_with_the_nearest(meldkit):
    for argv, message in (
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["marge"], "unknown command 'marge'; did you mean 'merge'?"),
        (["--verison"], "unknown option '--verison'"),
        (["train", "centralised-hf"], "unknown recipe 'centralised-hf'; did you mean 'centralized-hf'?"),
        (["data", "chek"], "unknown command 'chek'; did you mean 'check'?"),
        (["completion", "fish"], "unknown shell 'fish'"),
    ):
        result = meldkit(*argv)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {message}")
        assert "Traceback" not in result.stderr


def test_the_installed_command_is_this_one():
    result = subprocess.run(
        [Path(sys.executable).with_name("meldkit"), "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("meldkit 0.")


@pytest.mark.parametrize("columns", [40, 72, 110, 300])
def test_help_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for recipe, config_class in RECIPES.items():
        for line in option_help.recipe_help(recipe, config_class).splitlines():
            # A word that is longer than the terminal cannot be broken.
            assert len(line) <= max(40, min(columns, 110)) or len(line.split()) <= 2, line
    for text in (texts.main_help(), texts.train_help(), texts.data_help()):
        assert max(map(len, text.splitlines()[2:])) <= max(80, columns)


def test_recipe_help_has_every_option_with_its_default():
    text = option_help.recipe_help("centralized-hf", RECIPES["centralized-hf"])
    for name, field in RECIPES["centralized-hf"].model_fields.items():
        flag = name.replace("_", "-")
        assert f"  --{flag} " in text or f"  --[no-]{flag}" in text, name
        first_words = " ".join((field.description or "").split()[:3])
        assert first_words in " ".join(text.split()), name
    assert "Peak learning rate. [0.0001]" in text
    assert text.count("[required]") == sum(
        f.is_required() for f in RECIPES["centralized-hf"].model_fields.values()
    )
    assert "--task causal-lm|sequence-classification" in text
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[:3] == ["Model:", "Adapter:", "Quantization of the frozen base:"]
    assert "\x1b" not in text  # standard output is no terminal here


def test_help_is_emphasised_on_a_terminal():
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    subprocess.run(
        [sys.executable, "-m", "toolkit", "--help"], stdout=follower, env=environment, check=True, timeout=60
    )
    os.close(follower)
    assert b"\x1b[1mCommands:\x1b[0m" in os.read(leader, 100_000)
    os.close(leader)


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m toolkit train centralized-hf --help | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("usage:")
    assert result.stderr == ""


def test_a_recipe_may_be_written_with_underscores(capsys):
    assert main(["train", "centralized_hf", "--help"]) == 0
    assert "usage: meldkit train centralized-hf" in capsys.readouterr().out
