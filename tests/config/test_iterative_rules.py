"""Rules between the options of iterative training and merging."""

import pytest

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.errors import ConfigError

LOCALES = ["--locales", "en-US,fr-FR,de-DE"]
FISHER = "--merge-algorithm fisher_dataset"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems(flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(IterativeConfig, [*LOCALES, *flags.split()])
    return caught.value.problems


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--locale fr-FR", "--locale: has no place here: locales lists those that are trained"),
        ("--max-steps 5", "--max-steps: has no place here: merges come after whole epochs"),
        ("--deepspeed zero2", "--deepspeed: has no place here: it shards one model"),
        (
            "--max-rows-by-locale fr-fr=5",
            "--max-rows-by-locale fr-fr: is none of the locales en-US, fr-FR, de-DE; did",
        ),
        ("--participants-per-step 4", "--participants-per-step: 4 is more than there are locales (3)"),
        ("--num-processes 4", "--num-processes: 4 is more than there are locales (3)"),
        ("--similarity-top-k 4", "--similarity-top-k: 4 is more than there are locales (3)"),
        (
            "--merge-scope each --target-languages fr-FR",
            "--target-languages: does nothing with merge_scope: each",
        ),
        ("--eval-data held_out.json", "--eval-data: and data must both have {locale}"),
        ("--data rows.json --eval-data {locale}.json", "--eval-data: and data must both have {locale}"),
        ("--fp16 --mixed-precision bf16", "--fp16: excludes mixed_precision: bf16"),
        ("--task causal-lm --metric accuracy", "--metric: 'accuracy' is for classifiers"),
        ("--task causal-lm --metric f1", "--metric: 'f1' is for classifiers"),
        ("--eval-every never --merge-gate", "--merge-gate: needs evaluations"),
        ("--eval-every never --adaptive-merge-frequency", "--adaptive-merge-frequency: needs evaluations"),
        ("--eval-every never --performance-merge-trigger", "--performance-merge-trigger: needs evaluations"),
        ("--eval-every never --early-stopping-patience 2", "--early-stopping-patience: needs evaluations"),
        (
            "--weight-calculation manual",
            "manual_weights: lacks en-US, fr-FR, de-DE; every locale needs a weight, e.g. en-US=1,fr-FR=1,de-DE=1",
        ),
        (
            "--weight-calculation manual --manual-weights en-US=1,fr-FR=1",
            "--manual-weights: lacks de-DE; every locale needs a weight",
        ),
        (
            "--weight-calculation manual --manual-weights en-US=1,fr-FR=1,de-DE=1,de-AT=1",
            "--manual-weights de-AT: is none of the locales en-US, fr-FR, de-DE; did you mean 'de-DE'?",
        ),
        (
            "--weight-calculation manual --manual-weights en-US=0,fr-FR=0,de-DE=0",
            "--manual-weights: are all zero",
        ),
        ("--manual-weights en-US=1", "--manual-weights: does nothing without weight_calculation: manual"),
        (
            "--weight-calculation average --similarity-features genetic",
            "--similarity-features: does nothing without weight_calculation: similarity",
        ),
        (
            "--weight-calculation performance --similarity-top-k 2",
            "--similarity-top-k: does nothing without weight_calculation: similarity",
        ),
        (
            f"{FISHER} --preweight equal --similarity-measure shifted",
            "--similarity-measure: does nothing without preweight: uriel",
        ),
        (
            f"{FISHER} --preweight equal --similarity-sinkhorn 5",
            "--similarity-sinkhorn: does nothing without preweight: uriel",
        ),
        (
            "--preweight uriel",
            "--preweight: does nothing without merge_algorithm: fisher_dataset or fisher or",
        ),
        (
            "--merge-algorithm ties --preweight equal",
            "--preweight: does nothing without merge_algorithm: fisher_",
        ),
        (
            f"{FISHER} --preweight equal --weight-calculation average",
            "--preweight: excludes weight_calculation",
        ),
        (
            "--fisher-data-mode both",
            "--fisher-data-mode: does nothing without merge_algorithm: fisher_dataset",
        ),
        (
            "--num-fisher-examples 5",
            "--num-fisher-examples: does nothing without merge_algorithm: fisher_dataset",
        ),
        (
            "--merge-algorithm fisher_simple --fisher-batch-size 4",
            "--fisher-batch-size: does nothing without merge_algorithm: fisher_dataset",
        ),
        (
            "--merge-algorithm from_optimizer --optim sgd",
            "--merge-algorithm: from_optimizer needs Adam's second mo",
        ),
        ("--merge-algorithm ties --lora-merge svd", "--lora-merge: svd is the mean of the products"),
        ("--finetuning full --lora-merge svd", "--lora-merge: does nothing with finetuning: full"),
        ("--gate-tolerance 0.1", "--gate-tolerance: does nothing without merge_gate"),
        ("--no-baselines --bootstrap-samples 100", "--bootstrap-samples: does nothing without baselines"),
        (
            "--early-stopping-threshold 0.1",
            "--early-stopping-threshold: does nothing without early_stopping_patience",
        ),
        ("--min-merge-frequency 2", "--min-merge-frequency: does nothing without adaptive_merge_frequency"),
        ("--max-merge-frequency 5", "--max-merge-frequency: does nothing without adaptive_merge_frequency"),
        (
            "--convergence-threshold 1e-3",
            "--convergence-threshold: does nothing without adaptive_merge_frequency or p",
        ),
        (
            "--adaptive-window 5",
            "--adaptive-window: does nothing without adaptive_merge_frequency or performance_m",
        ),
        (
            "--adaptive-merge-frequency --min-merge-frequency 6 --max-merge-frequency 5",
            "--min-merge-frequency: 6 is more than max_merge_frequency (5)",
        ),
        (
            "--adaptive-merge-frequency --merge-frequency 11",
            "--merge-frequency: 11 does not lie between min_ and max_merge_frequency (1 and 10)",
        ),
        (
            "--adaptive-merge-frequency --merge-frequency 2 --min-merge-frequency 3",
            "--merge-frequency: 2 does not lie between min_ and max_merge_frequency (3 and 10)",
        ),
        ("--schedule fixed --adaptive-merge-frequency", "--adaptive-merge-frequency: excludes schedule"),
    ],
)
def test_options_that_do_not_fit_together(flags, message):
    found = problems(flags)
    assert len(found) == 1, found
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    "flags",
    [
        "--weight-calculation manual --manual-weights en-US=0.4,fr-FR=0.3,de-DE=0.3",
        "--weight-calculation manual --manual-weights en-US=4,fr-FR=0,de-DE=3",
        "--similarity-top-k 3 --similarity-features geographic --similarity-measure shifted --similarity-sinkhorn 10",
        f"{FISHER} --preweight uriel --similarity-top-k 2",
        f"{FISHER} --fisher-data-mode both --num-fisher-examples 50 --fisher-batch-size 4",
        f"{FISHER} --weight-calculation average",
        "--merge-algorithm fisher_simple --preweight equal",
        "--merge-algorithm from_optimizer --preweight uriel",
        "--adaptive-merge-frequency --min-merge-frequency 3 --max-merge-frequency 3",
        "--adaptive-merge-frequency --adaptive-window 5 --convergence-threshold 0.01",
        "--performance-merge-trigger --adaptive-window 5 --convergence-threshold 0.01",
        "--schedule adaptive --min-merge-frequency 2 --adaptive-window 4",
        "--merge-gate --gate-tolerance 0.01",
        "--early-stopping-patience 3 --early-stopping-threshold 0.01",
        "--merge-scope each --merge-algorithm linear --lora-merge svd",
        "--task causal-lm --metric loss",
        "--num-processes 3 --participants-per-step 3",
        "--target-languages sq-AL",
        "--fp16 --mixed-precision fp16",
        "--data {locale}.json --eval-data held_out/{locale}.json",
        "--data rows.json --eval-data held_out.json",
        "--finetuning full",
        "--eval-every never",
    ],
)
def test_options_that_fit_together(flags):
    assert load(IterativeConfig, [*LOCALES, *flags.split()]).config


def test_everything_comes_at_once():
    found = problems(
        "--locale en-US --gate-tolerance 1 --merge-algorithm ties --preweight uriel --max-epochs 1.5"
    )
    assert len(found) == 4


def test_wrong_locales_hide_only_what_depends_on_them():
    with pytest.raises(ConfigError) as caught:
        load(
            IterativeConfig,
            ["--locales", "en", "fr", "--locales", "x", "--gate-tolerance", "1", "--num-processes", "9"],
        )
    assert caught.value.problems == [
        "'fr': an option begins with --; several values of --locales are written --locales a,b",
        "--locales: 'x' is not a locale like en-US, sq-AL or sr-Latn",
        "--gate-tolerance: does nothing without merge_gate",
    ]


def test_a_configuration_built_in_python_obeys_the_same_rules():
    with pytest.raises(ValueError, match="gate_tolerance does nothing without merge_gate"):
        IterativeConfig(locales=["en-US"], gate_tolerance=0.1)


def test_a_saved_configuration_loads_again(tmp_path):
    from toolkit.config.render import as_yaml, save

    loaded = load(
        IterativeConfig,
        [
            *LOCALES,
            "--enable-wandb",
            "--manual-weights",
            "en-US=1,fr-FR=1,de-DE=1",
            "--weight-calculation",
            "manual",
            "--merge-parameters",
            "normalize=true",
        ],
    )
    save(loaded, tmp_path / "experiment_config.json")
    (tmp_path / "run.yaml").write_text(as_yaml(loaded))
    for name in ("experiment_config.json", "run.yaml"):
        assert load(IterativeConfig, ["--config-file", str(tmp_path / name)]).config == loaded.config
