"""The commands of the document on iterative training: each as it is written there, with the script's name replaced."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli.main import main
from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig

ROOT = Path(__file__).parents[2]
COMMANDS = json.loads((Path(__file__).parents[1] / "commands_of_the_document.json").read_text())
TROUBLES = """
--batch-size 32
--gradient-accumulation-steps 4
--fp16
--enable-auto-recovery
--merge-timeout 1200
--validate-merge-integrity
--adaptive-merge-frequency
--learning-rate 1e-4
--adaptive-merge-frequency --convergence-threshold 1e-5
--max-merge-attempts 5
--merge-algorithm fisher_simple
--weight-calculation average
--weight-calculation manual --manual-weights en-US=0.4,fr-FR=0.6
"""
"""What the document advises besides, to be added to a command."""

FLAGS = {
    "--locales en-US,fr-FR": ("locales", ["en-US", "fr-FR"]),
    "--max-epochs 7": ("max_epochs", 7.0),
    "--learning-rate 5e-5": ("learning_rate", 5e-5),
    "--batch-size 4": ("batch_size", 4),
    "--gradient-accumulation-steps 2": ("gradient_accumulation_steps", 2),
    "--fp16": ("fp16", True),
    "--merge-frequency 2": ("merge_frequency", 2),
    "--merge-algorithm fisher_simple": ("merge_algorithm", "fisher_simple"),
    "--weight-calculation average": ("weight_calculation", "average"),
    "--adaptive-merge-frequency": ("adaptive_merge_frequency", True),
    "--performance-merge-trigger": ("performance_merge_trigger", True),
    "--performance-merge-trigger --convergence-threshold 1e-3": ("convergence_threshold", 1e-3),
    "--checkpoint-before-merge": ("checkpoint_before_merge", True),
    "--retain-merge-checkpoints 5": ("retain_merge_checkpoints", 5),
    "--enable-wandb": ("report_to", ["tensorboard", "wandb"]),
    "--wandb-project X": ("project", "X"),
    "--enable-auto-recovery": ("enable_auto_recovery", True),
    "--validate-merge-integrity": ("validate_merge_integrity", True),
    "--max-merge-attempts 2": ("max_merge_attempts", 2),
    "--merge-timeout 1200": ("merge_timeout", 1200.0),
    "--merge-algorithm fisher_dataset --fisher-data-mode both": ("fisher_data_mode", "both"),
    "--merge-algorithm fisher_dataset --num-fisher-examples 9": ("num_fisher_examples", 9),
    "--merge-algorithm fisher_dataset --fisher-batch-size 4": ("fisher_batch_size", 4),
    "--target-languages sq-AL": ("target_languages", ["sq-AL"]),
    "--output-dir elsewhere": ("output_dir", Path("elsewhere")),
    "--log-level DEBUG": ("log_level", "DEBUG"),
}
"""Every flag of the document, and what it says."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, W&B as if it were installed, and no launcher's traces."""
    packages = tmp_path / "packages"
    (packages / "wandb").mkdir(parents=True)
    (packages / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "LOCAL_RANK", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


def dry_run(command: str, capsys) -> str:
    status = main(["train", "iterative-merge", *shlex.split(command), "--cpu", "--dry-run"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "saved"])
def test_every_command_of_the_document_passes_a_dry_run(name, capsys):
    text = dry_run(COMMANDS[name], capsys)
    assert "# Dry run: nothing was started." in text
    assert shlex.split(COMMANDS[name])[1].replace(",", '", "') in text  # the locales


def test_a_saved_configuration_is_used_later(capsys):
    dry_run(COMMANDS["saving"], capsys)
    saved = json.loads(Path("experiment_1/experiment_config.json").read_text())
    assert saved["locales"] == ["en-US", "fr-FR"]
    text = dry_run(COMMANDS["saved"], capsys)
    assert re.search(r'locales: \["en-US", "fr-FR"\] +# experiment_1/experiment_config.json:\d+', text)


@pytest.mark.parametrize("advice", TROUBLES.strip().splitlines())
def test_what_the_document_advises_can_be_added(advice, capsys):
    dry_run(f"--locales en-US,fr-FR --max-epochs 10 --merge-frequency 2 {advice}", capsys)


@pytest.mark.parametrize("flags", list(FLAGS))
def test_every_flag_of_the_document_sets_what_it_says(flags):
    name, value = FLAGS[flags]
    argv = flags.split() if "--locales" in flags else ["--locales", "en-US,fr-FR", *flags.split()]
    default = getattr(load(IterativeConfig, ["--locales", "de-DE"]).config, name)
    assert getattr(load(IterativeConfig, argv).config, name) == value != default


def test_every_flag_of_the_commands_is_in_the_table():
    in_table = set(re.findall(r"--[a-z0-9-]+", " ".join(FLAGS)))
    in_commands = set(re.findall(r"--[a-z0-9-]+", " ".join([*COMMANDS.values(), TROUBLES])))
    assert in_commands - in_table == {"--save-config", "--config-file", "--manual-weights"}


def test_without_arguments_the_file_of_the_recipe_counts(capsys):
    text = dry_run("", capsys)
    assert re.search(r'locales: \["en-US", "fr-FR", "de-DE"\] +# iterative_merge.yaml:\d+', text)


@pytest.mark.slow
def test_all_ways_in_are_the_same(tmp_path):
    options = ["--locales", "en-US,fr-FR", "--merge-frequency", "2", "--cpu", "--print-config"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    ways = [
        [sys.executable, "-m", "toolkit", "train", "iterative-merge"],
        [sys.executable, str(ROOT / "recipes" / "iterative_merge.py")],
        [*launch, str(ROOT / "recipes" / "iterative_merge.py")],
        ["bash", str(ROOT / "scripts" / "run_iterative_merge.sh")],
    ]
    environ = {**os.environ, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for way in ways:
        result = subprocess.run([*way, *options], capture_output=True, text=True, env=environ, check=False)
        assert result.returncode == 0, result.stderr
        found.append(result.stdout)
    assert found[0].startswith("# Locales")
    assert found == [found[0]] * len(ways)


def test_the_hub_data_of_the_document_works_by_name(capsys):
    text = dry_run(
        "--locales en-US,fr-FR --data AmazonScience/massive:{locale} --model xlm-roberta-base", capsys
    )
    assert "AmazonScience/massive:{locale}" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--data ./rows/{locale}.jsonl",
            "data: there is no ./rows/en-US.jsonl\n  data: there is no ./rows/fr-FR.jsonl\n  hint: without --data",
        ),
        (
            "--model sample:tiny-xlmr",
            "there is no sample model named 'tiny-xlmr'; did you mean 'tiny-xlm-r'?",
        ),
        ("--data sample:intent", "there is no sample data set named 'intent'; did you mean 'intents'?"),
        ("--target-languages am-ET", "there is no locale named 'am-ET'"),
        ("--target-languages xq-XX", "the typological data (URIEL) has no language 'xq'"),
        (
            "--similarity-features syntax_average --target-languages af-ZA",
            "syntax_average: too little is known about",
        ),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(flags, message, capsys):
    for more in ([], ["--dry-run"]):
        argv = ["train", "iterative-merge", "--locales", "en-US,fr-FR", "--cpu", *flags.split(), *more]
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_names_that_are_registered_are_checked_with_the_options(meldkit):
    wrong = ["--merge-algorithm", "teis", "--gate-tolerance", "1"]
    result = meldkit("train", "iterative-merge", "--locales", "en-US,fr-FR", *wrong, "--print-config")
    assert result.returncode == 2
    assert "2 problems in the configuration" in result.stderr
    assert "did you mean 'ties'?" in result.stderr
