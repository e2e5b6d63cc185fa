"""Options of iterative training and merging by themselves: defaults, values, what is derived from them."""

from pathlib import Path
from typing import get_args

import pytest

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.errors import ConfigError
from toolkit.languages import FEATURES

LOCALES = ["--locales", "en-US,fr-FR,de-DE"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*flags: str) -> IterativeConfig:
    return load(IterativeConfig, [*LOCALES, *flags]).config


def problems(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(IterativeConfig, list(flags))
    return caught.value.problems


def test_the_defaults_are_those_of_the_document():
    config = read()
    expected = {
        "max_epochs": 15,
        "merge_frequency": 3,
        "merge_algorithm": "linear",
        "weight_calculation": "similarity",
        "convergence_threshold": 1e-4,
        "min_merge_frequency": 1,
        "max_merge_frequency": 10,
        "output_dir": Path("iterative_results"),
        "task": "sequence-classification",
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
        "retain_merge_checkpoints": 3,
        "max_merge_attempts": 3,
        "merge_timeout": 600,
        "num_fisher_examples": 100,
        "fisher_batch_size": 8,
        "baselines": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    switches = """adaptive_merge_frequency performance_merge_trigger checkpoint_before_merge enable_auto_recovery
        validate_merge_integrity merge_gate fp16"""
    assert not any(getattr(config, name) for name in switches.split())


def test_the_features_are_those_that_languages_have():
    assert get_args(IterativeConfig.model_fields["similarity_features"].annotation) == FEATURES


def test_the_number_of_epochs_is_whole():
    assert read("--max-epochs", "4").num_epochs == 4
    assert problems(*LOCALES, "--max-epochs", "2.5") == [
        "--max-epochs: 2.5 is not a whole number; merges come after whole epochs"
    ]


@pytest.mark.parametrize(
    "locales", ["en-US", "sq-AL,en-US", "sr-Latn,sr-RS", "zh-Hant-TW", "es-419", "fil-PH", "de", "en_US"]
)
def test_locales_that_are_some(locales):
    config = load(IterativeConfig, ["--locales", locales]).config
    assert config.locales == locales.split(",")


@pytest.mark.parametrize(
    ("locales", "message"),
    [
        ("en-us", "'en-us' is not a locale like en-US, sq-AL or sr-Latn; did you mean 'en-US'?"),
        ("EN_US", "'EN_US' is not a locale like en-US, sq-AL or sr-Latn; did you mean 'en-US'?"),
        ("sr-latn", "'sr-latn' is not a locale like en-US, sq-AL or sr-Latn; did you mean 'sr-Latn'?"),
        ("english", "'english' is not a locale like en-US, sq-AL or sr-Latn"),
        ("../en-US", "'../en-US' is not a locale like en-US, sq-AL or sr-Latn"),
        ("en-US/", "'en-US/' is not a locale like en-US, sq-AL or sr-Latn"),
        ("en-US,", "'' is not a locale like en-US, sq-AL or sr-Latn"),
        ("en-US,fr-FR,en-US", "'en-US' is given twice"),
        ("en-US,en_US", "'en_US' is given twice"),
        ("none", "names no locale; one at least, e.g. en-US,fr-FR"),
    ],
)
def test_locales_that_are_none(locales, message):
    assert problems("--locales", locales) == [f"--locales: {message}"]


def test_locales_are_required():
    assert problems("--max-epochs", "3", "--output-dir", "o", "--locale", "en-US")[0] == (
        "locales is missing: --locales A,B (locales that are trained, each with its own data and optimizer)"
    )


@pytest.mark.parametrize(
    "flag",
    [
        "--merge-frequency=0",
        "--participants-per-step=0",
        "--gate-tolerance=-1",
        "--similarity-top-k=0",
        "--similarity-sinkhorn=-1",
        "--num-fisher-examples=0",
        "--fisher-batch-size=0",
        "--min-merge-frequency=0",
        "--max-merge-frequency=0",
        "--adaptive-window=1",
        "--convergence-threshold=0",
        "--early-stopping-patience=-1",
        "--early-stopping-threshold=-1",
        "--retain-merge-checkpoints=0",
        "--max-merge-attempts=0",
        "--merge-timeout=0",
        "--bootstrap-samples=99",
        "--max-rows-by-locale=fr-FR=0",
        "--manual-weights=en-US=-1",
        "--batch-size=0",
        "--gradient-accumulation-steps=0",
        "--max-epochs=0",
    ],
)
def test_numbers_out_of_range(flag):
    found = problems(*LOCALES, flag)
    assert len(found) == 1
    assert "is out of range; it must be" in found[0]


@pytest.mark.parametrize(
    "flag",
    [
        "--merge-scope=all",
        "--lora-merge=concat",
        "--optimizer-on-merge=drop",
        "--similarity-features=syntax",
        "--similarity-measure=euclid",
        "--preweight=similarity",
        "--fisher-data-mode=all",
        "--metric=bleu",
        "--task=token",
    ],
)
def test_words_that_are_none_of_the_choices(flag):
    found = problems(*LOCALES, flag)
    assert len(found) == 1
    assert "is not one of" in found[0]


def test_targets_are_all_locales_unless_some_are_named():
    assert read().targets == ("en-US", "fr-FR", "de-DE")
    assert read("--target-languages", "sq-AL,fr-FR").targets == ("sq-AL", "fr-FR")


def test_preweight_decides_the_weighting_of_fisher_information():
    assert read("--weight-calculation", "average").weighting == "average"
    fisher = ["--merge-algorithm", "fisher_dataset"]
    assert read(*fisher).weighting == "similarity"
    assert read(*fisher, "--preweight", "equal").weighting == "average"
    assert read(*fisher, "--preweight", "uriel").weighting == "similarity"


def test_fisher_dataset_is_the_engines_fisher():
    assert read("--merge-algorithm", "fisher_dataset").merge_method == "fisher"
    assert read("--merge-algorithm", "ties").merge_method == "ties"


def test_a_source_with_a_place_for_the_locale_is_read_for_each():
    config = read("--data", "AmazonScience/massive:{locale}", "--eval-data", "./held_out/{locale}.jsonl")
    own = config.for_locale("fr-FR")
    assert (own.data, own.eval_data, own.locale) == (
        "AmazonScience/massive:fr-FR",
        "./held_out/fr-FR.jsonl",
        None,
    )
    assert config.data == "AmazonScience/massive:{locale}"


def test_a_source_with_all_locales_is_read_by_its_column():
    own = read("--data", "rows.jsonl").for_locale("fr-FR")
    assert (own.data, own.eval_data, own.locale) == ("rows.jsonl", None, "fr-FR")


def test_single_locales_may_have_fewer_rows():
    config = read("--max-rows", "500", "--max-rows-by-locale", "de-DE=50")
    assert [config.for_locale(locale).max_rows for locale in config.locales] == [500, 500, 50]
    assert [read().for_locale(locale).max_rows for locale in config.locales] == [None, None, None]


def test_the_same_options_stand_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "locales: [en-US, fr-FR]\nweight_calculation: manual\nmanual_weights:\n  en-US: 0.75\n  fr-FR: 1\n"
        "merge_algorithm: ties\nmerge_parameters:\n  density: 0.5\nmax_rows_by_locale: {fr-FR: 50}\n"
    )
    config = load(IterativeConfig, ["--config-file", "run.yaml", "--manual-weights", "en-US=0.5"]).config
    assert config.locales == ["en-US", "fr-FR"]
    assert config.manual_weights == {"en-US": 0.5, "fr-FR": 1.0}
    assert config.merge_parameters == {"density": 0.5}
    assert config.max_rows_by_locale == {"fr-FR": 50}
