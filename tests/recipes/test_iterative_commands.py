"""The commands of the document, scaled down to a tiny encoder, few rows and epochs, really run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

COMMANDS = json.loads((Path(__file__).parents[1] / "commands_of_the_document.json").read_text())
del COMMANDS["saved"]  # a test of its own, below
FEWER_EPOCHS = {"15": "4", "20": "4", "25": "4", "10": "4"}
"""Still more than the merge frequency."""
WANDB = """
import json, pathlib

def init(**options):
    return Run(pathlib.Path(options["dir"]) / "wandb.jsonl", options["project"])

class Run:
    def __init__(self, path, project):
        self.stream = open(path, "a")
        self.log({"project": project})
    def log(self, values):
        self.stream.write(json.dumps(values) + "\\n")
    def define_metric(self, *arguments, **options):
        pass
    def finish(self, exit_code=0):
        self.log({"exit_code": exit_code})
        self.stream.close()
"""
"""A W&B that writes to a file: the real one is not installed here, and wants a network."""


@pytest.fixture(scope="module")
def many_locales(tmp_path_factory, intent_data):
    folder = tmp_path_factory.mktemp("many")
    for locale in ("en-US", "fr-FR", "de-DE", "sq-AL", "es-ES", "it-IT", "pt-PT"):
        source = intent_data / (locale if (intent_data / locale).exists() else "fr-FR")
        shutil.copytree(source, folder / locale)
        for path in (folder / locale).iterdir():
            path.write_text(path.read_text().replace(source.name, locale))
    return folder


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(package.parent))


def anywhere(command: str) -> str:
    return re.sub(r"--output-dir \S+", "", command)


def scaled(command: str) -> list[str]:
    words = shlex.split(anywhere(command))
    if "--max-epochs" not in words:
        words += ["--max-epochs", "3"]
    place = words.index("--max-epochs") + 1
    words[place] = FEWER_EPOCHS.get(words[place], words[place])
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_of_the_document_runs(iterate, tmp_path, tiny_encoder, many_locales, wandb, name):
    words = scaled(COMMANDS[name])
    run = iterate(
        tmp_path / "run",
        *words,
        "--model",
        tiny_encoder,
        "--data",
        many_locales,
        "--max-rows",
        16,
        defaults=False,
    )
    assert run.status == 0, run.err
    locales = words[words.index("--locales") + 1].split(",")
    statistics = run.read("final_statistics.json")
    assert statistics["status"] == "done"
    assert list(statistics["verdicts"]) == locales
    assert run.merge_epochs
    assert set(run.weights) == set(locales)
    assert "Did merging help?" in run.out
    if "--enable-wandb" in words:
        logged = [json.loads(line) for line in (run.folder / "wandb.jsonl").read_text().splitlines()]
        assert logged[0] == {"project": words[words.index("--wandb-project") + 1]}
        assert logged[-1] == {"exit_code": 0}
        assert any(key.startswith("it-IT/train/loss") for values in logged for key in values)
    if "--log-level" in words:
        assert "DEBUG" in (run.folder / "iterative_training.log").read_text()
    if "--target-languages" in words:
        assert [list(mixture) for mixture in run.mixtures] == [["sq-AL"]]
    assert run.read("experiment_config.json")["locales"] == locales


@pytest.mark.slow
def test_a_saved_configuration_runs_again(iterate, tmp_path, tiny_encoder, many_locales, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [
        "--model",
        tiny_encoder,
        "--data",
        many_locales,
        "--max-epochs",
        2,
        "--merge-frequency",
        1,
        "--no-baselines",
    ]
    first = iterate(tmp_path / "first", *shlex.split(anywhere(COMMANDS["saving"])), *few, defaults=False)
    assert first.status == 0, first.err
    again = iterate(tmp_path / "second", "--config-file", "first/experiment_config.json", defaults=False)
    assert again.status == 0, again.err
    assert again.weights == first.weights
