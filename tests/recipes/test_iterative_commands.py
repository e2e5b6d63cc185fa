"""The commands of the document, scaled down to a tiny encoder, few rows and epochs, really run."""

import json
import shlex
import shutil

import pytest

COMMANDS = {
    "basic": "--locales en-US,fr-FR,de-DE --max-epochs 15 --merge-frequency 3 --merge-algorithm linear "
    "--weight-calculation similarity",
    "adaptive": "--locales en-US,fr-FR,de-DE,es-ES,it-IT --max-epochs 20 --merge-frequency 3 --merge-algorithm linear "
    "--adaptive-merge-frequency --performance-merge-trigger --convergence-threshold 1e-4 --checkpoint-before-merge "
    "--enable-wandb --wandb-project Iterative-Training-Experiment --save-config",
    "saving": "--locales en-US,fr-FR --save-config",
    "two models": "--locales en-US,fr-FR --max-epochs 10 --merge-frequency 2 --merge-algorithm linear",
    "fisher": "--locales en-US,fr-FR,de-DE --max-epochs 15 --merge-frequency 3 --merge-algorithm fisher_dataset "
    "--fisher-data-mode target --num-fisher-examples 200 --fisher-batch-size 32",
    "large": "--locales en-US,fr-FR,de-DE,es-ES,it-IT,pt-PT --max-epochs 25 --merge-frequency 2 --merge-algorithm "
    "linear --adaptive-merge-frequency --performance-merge-trigger --convergence-threshold 5e-5 --fp16 "
    "--gradient-accumulation-steps 2 --batch-size 64 --enable-wandb --wandb-project Large-Scale-Iterative "
    "--checkpoint-before-merge --retain-merge-checkpoints 5 --enable-auto-recovery --validate-merge-integrity",
    "target": "--locales sq-AL,en-US,fr-FR --merge-frequency 3 --target-languages sq-AL",
    "debug": "--locales en-US,fr-FR --log-level DEBUG --max-epochs 3 --merge-frequency 1",
}
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


def scaled(command: str) -> list[str]:
    words = shlex.split(command)
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
    first = iterate(tmp_path / "first", *shlex.split(COMMANDS["saving"]), *few, defaults=False)
    assert first.status == 0, first.err
    again = iterate(tmp_path / "second", "--config-file", "first/experiment_config.json", defaults=False)
    assert again.status == 0, again.err
    assert again.weights == first.weights
