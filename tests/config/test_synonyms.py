"""Other names of options."""

import pytest

from toolkit.config.load import load
from toolkit.config.option_help import recipe_help
from toolkit.config.recipes import CentralizedConfig, IterativeConfig
from toolkit.errors import ConfigError

LOCALES = ["--locales", "en-US"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*flags: str, file: str | None = None) -> IterativeConfig:
    if file is None:
        return load(IterativeConfig, [*LOCALES, *flags]).config
    with open("run.yaml", "w") as stream:
        stream.write(file)
    return load(IterativeConfig, ["--config", "run.yaml", *LOCALES, *flags]).config


def problems(*flags: str, file: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*flags, file=file)
    return caught.value.problems


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ("--enable-wandb", ["tensorboard", "wandb"]),
        ("--enable_wandb", ["tensorboard", "wandb"]),
        ("--enable-wandb true", ["tensorboard", "wandb"]),
        ("--enable-wandb=false", ["tensorboard"]),
        ("--no-enable-wandb", ["tensorboard"]),
        ("--enable-wandb --report-to trackio", ["trackio", "wandb"]),
        ("--report-to wandb --enable-wandb", ["wandb"]),
        ("--report-to none --enable-wandb", ["wandb"]),
    ],
)
def test_a_switch_adds_to_a_list(flags, trackers):
    assert read(*flags.split()).report_to == trackers


def test_a_name_stands_for_another():
    assert read("--wandb-project", "Iterative").project == "Iterative"
    loaded = load(IterativeConfig, [*LOCALES, "--wandb-project", "Iterative", "--enable-wandb"])
    assert loaded.provenance["project"] == "flag --wandb-project"
    assert loaded.provenance["report_to"] == "default, flag --enable-wandb"


def test_both_stand_in_files_too():
    config = read(file="enable_wandb: true\nwandb_project: Iterative\n")
    assert (config.report_to, config.project) == (["tensorboard", "wandb"], "Iterative")
    assert read(file="enable_wandb: false\n").report_to == ["tensorboard"]
    assert read("--enable-wandb", file="report_to: [trackio]\n").report_to == ["trackio", "wandb"]
    assert read("--report-to", "trackio", file="enable_wandb: true\n").report_to == ["trackio", "wandb"]


def test_what_is_wrong_is_said_under_the_name_that_was_typed():
    assert problems("--enable-wandb=perhaps") == ["--enable-wandb: 'perhaps' is not true or false"]
    assert problems("--wandb-project") == ["--wandb-project: no value is given; --wandb-project TEXT"]
    assert problems("--wandb-project", "a", "--project", "b") == [
        "--project: is given twice; first as --wandb-project"
    ]
    assert problems("--enable-wandbs") == ["--enable-wandbs: unknown option; did you mean '--enable-wandb'?"]
    assert problems(file="enable_wandb: 7\n") == ["run.yaml:1: enable_wandb: 7 is not true or false"]
    assert problems("--report-to", "mlflow", "--enable-wandb") == [
        "--report-to: 'mlflow' is not one of tensorboard, wandb, trackio"
    ]


def test_a_recipe_without_them_says_what_they_are_called():
    with pytest.raises(ConfigError, match="--enable-wandb: unknown option; it is called '--report-to' here"):
        load(CentralizedConfig, ["--model", "m", "--data", "d", "--output-dir", "o", "--enable-wandb"])


def test_the_help_lists_them_and_leaves_out_what_has_no_place():
    text = recipe_help("iterative-merge", IterativeConfig)
    assert "--enable-wandb" in text
    assert "The same as --project." in text
    assert "Adds wandb to --report-to." in text
    for flag in ("--locale ", "--max-steps", "--deepspeed"):
        assert flag not in text
