"""Every option of iterative training is followed: given, it changes what it names in a real run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.iterative_options import HalfPrecisionOptions, IterativeOptions

THREE = "--locales en-US,fr-FR,de-DE"
TIES = "--merge-algorithm ties"
FISHER = "--merge-algorithm fisher_dataset --num-fisher-examples 12"
STEPWISE = "--max-epochs 4 --merge-frequency 4 --batch-size 24 --metric loss"
"""One step an epoch."""
ADAPTIVE = f"{STEPWISE} --adaptive-merge-frequency --adaptive-window 2 --convergence-threshold 1000"
"""Whatever happens, everybody has converged as soon as there are two evaluations."""
ANYTHING = object()


@dataclass(frozen=True)
class Case:
    """``added``, given with ``base``, must change what ``seen`` finds in the run: to ``expected``, if that is known."""

    base: str
    added: str
    seen: Callable[[Any], Any]
    expected: Any = ANYTHING


def together(base: str, added: str) -> list[str]:
    """The words of both; a flag that both give stands there once, as added."""
    flags: dict[str, list[str]] = {}
    for options in (base, added):
        for flag in options.split("--")[1:]:
            name, *values = flag.split()
            flags[name] = values
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def mixture(run) -> dict[str, dict[str, float]]:
    return {
        target: {name: round(share, 9) for name, share in shares.items()}
        for target, shares in run.mixtures[0].items()
    }


def weights(run) -> dict[str, Any]:
    return run.weights


def merge_epochs(run) -> list[int]:
    return run.merge_epochs


def last_steps(run) -> dict[str, int]:
    return {step["participant"]: step["step"] for step in run.steps}


def stopped(run) -> dict[str, str]:
    return run.read("training_history.json")["rounds"][-1]["stopped"]


def checks(run) -> dict[str, Any]:
    found = run.events("merge")[0]["integrity"]["en-US,fr-FR"]
    return {name: value for name, value in found.items() if name != "products"}


def digests(run) -> list[str]:
    return sorted(run.events("merge")[0]["digests"]["en-US,fr-FR"]["inputs"])


def comparison(run) -> dict[str, Any]:
    return run.read("final_statistics.json")["comparison"]


THIRDS = dict.fromkeys(("en-US", "fr-FR", "de-DE"), round(1 / 3, 9))
ALL_THREE = "en-US,fr-FR,de-DE"
CASES: dict[str, list[Case]] = {
    "locales": [Case("", THREE, lambda run: run.read("training_history.json")["participants"], [*THIRDS])],
    "target_languages": [Case(THREE, "--target-languages de-DE", weights)],
    "max_rows_by_locale": [
        Case("", "--max-rows-by-locale fr-FR=12", last_steps, {"en-US": 4, "fr-FR": 2}),
    ],
    "merge_scope": [
        Case("", "--merge-scope each", lambda run: list(run.mixtures[0]), ["en-US", "fr-FR"]),
        Case("", "--merge-scope each", weights),
    ],
    "merge_frequency": [Case("", "--merge-frequency 2", merge_epochs, [2])],
    "merge_algorithm": [
        Case("--lora-merge factors", f"--merge-algorithm {name} {more}", weights)
        for name, more in (
            ("fisher_simple", ""),
            ("fisher_dataset", "--num-fisher-examples 8"),
            ("from_optimizer", ""),
            ("ties", ""),
            ("slerp", "--merge-parameters t=0.3"),
        )
    ],
    "merge_parameters": [Case(TIES, "--merge-parameters density=0.2", weights)],
    "lora_merge": [Case("", "--lora-merge factors", weights)],
    "optimizer_on_merge": [
        Case("", "--optimizer-on-merge reset", weights),
        Case("", "--optimizer-on-merge merge", weights),
        Case("--optimizer-on-merge reset", "--optimizer-on-merge merge", weights),
    ],
    "weight_calculation": [
        Case(THREE, "--weight-calculation average", mixture, {ALL_THREE: THIRDS}),
        Case(f"{THREE} --weight-calculation average", "--weight-calculation performance", mixture),
        Case(
            f"{THREE} --max-rows-by-locale fr-FR=12",
            "--weight-calculation num_examples",
            mixture,
            {ALL_THREE: {"en-US": 0.4, "fr-FR": 0.2, "de-DE": 0.4}},
        ),
    ],
    "manual_weights": [
        Case(
            "--weight-calculation manual --manual-weights en-US=1,fr-FR=1",
            "--manual-weights en-US=3,fr-FR=1",
            mixture,
            {"en-US,fr-FR": {"en-US": 0.75, "fr-FR": 0.25}},
        )
    ],
    "similarity_features": [Case(THREE, "--similarity-features phonology_knn", mixture)],
    "similarity_measure": [Case(THREE, "--similarity-measure shifted", mixture)],
    "similarity_top_k": [
        Case(
            "--merge-scope each",
            "--similarity-top-k 1",
            mixture,
            {"en-US": {"en-US": 1.0, "fr-FR": 0.0}, "fr-FR": {"en-US": 0.0, "fr-FR": 1.0}},
        )
    ],
    "similarity_sinkhorn": [Case(THREE, "--similarity-sinkhorn 5", mixture)],
    "preweight": [
        Case(f"{THREE} --merge-algorithm fisher_simple", "--preweight equal", mixture, {ALL_THREE: THIRDS}),
        Case(f"{THREE} --merge-algorithm fisher_simple --preweight equal", "--preweight uriel", mixture),
    ],
    "fisher_data_mode": [
        Case(f"{FISHER} --target-languages fr-FR", "--fisher-data-mode sources", weights),
        Case(
            f"{FISHER} --target-languages fr-FR --fisher-data-mode sources",
            "--fisher-data-mode both",
            weights,
        ),
    ],
    "num_fisher_examples": [Case(FISHER, "--num-fisher-examples 4", weights)],
    "schedule": [
        Case(
            f"{STEPWISE} --adaptive-window 2 --convergence-threshold 1000 --schedule fixed",
            "--schedule adaptive",
            merge_epochs,
            [2, 4],
        )
    ],
    "adaptive_merge_frequency": [
        Case(
            STEPWISE,
            "--adaptive-merge-frequency --adaptive-window 2 --convergence-threshold 1000",
            merge_epochs,
            [2, 4],
        )
    ],
    "min_merge_frequency": [Case(ADAPTIVE, "--min-merge-frequency 3", merge_epochs, [3])],
    "adaptive_window": [Case(ADAPTIVE, "--adaptive-window 4", merge_epochs, [4])],
    "convergence_threshold": [
        Case(f"{ADAPTIVE} --learning-rate 1e-4", "--convergence-threshold 1e-9", merge_epochs)
    ],
    "performance_merge_trigger": [
        Case(
            STEPWISE,
            "--performance-merge-trigger --adaptive-window 2 --convergence-threshold 1000",
            merge_epochs,
            [2, 4],
        )
    ],
    "early_stopping_patience": [
        Case(
            STEPWISE,
            "--early-stopping-patience 1 --early-stopping-threshold 1000",
            stopped,
            dict.fromkeys(("en-US", "fr-FR"), "no better for 1 evaluations"),
        ),
        Case(
            f"{STEPWISE} --early-stopping-patience 1 --early-stopping-threshold 1000",
            "--early-stopping-patience 2",
            last_steps,
            {"en-US": 3, "fr-FR": 3},
        ),
    ],
    "early_stopping_threshold": [
        Case(
            f"{STEPWISE} --learning-rate 1e-4 --early-stopping-patience 1",
            "--early-stopping-threshold 1000",
            last_steps,
            {"en-US": 2, "fr-FR": 2},
        )
    ],
    "checkpoint_before_merge": [
        Case(
            "",
            "--checkpoint-before-merge",
            lambda run: [c["epoch"] for c in run.events("loop")],
            [0, 1, 1, 2],
        )
    ],
    "retain_merge_checkpoints": [
        Case(
            "",
            "--retain-merge-checkpoints 1",
            lambda run: len(list((run.folder / "merged_models").iterdir())),
            1,
        )
    ],
    "validate_merge_integrity": [
        Case(
            "--lora-merge factors",
            "--validate-merge-integrity",
            checks,
            dict.fromkeys(
                (
                    "inputs_unchanged",
                    "names_shapes_dtypes",
                    "finite",
                    "weights_add_up_to_1",
                    "inside_envelope",
                ),
                True,
            ),
        ),
        Case("", "--validate-merge-integrity", digests, ["en-US", "fr-FR"]),
    ],
    "metric": [
        Case("", "--metric loss", lambda run: comparison(run)["metric"], "loss"),
        Case("", "--metric f1", lambda run: comparison(run)["metric"], "f1"),
    ],
    "baselines": [
        Case(
            "",
            "--baselines",
            lambda run: "own_training" in comparison(run)["participants"]["en-US"]["arms"],
            True,
        ),
        Case("", "--baselines", lambda run: run.read("final_statistics.json")["verdicts"]),
    ],
    "bootstrap_samples": [
        Case(
            "--baselines",
            "--bootstrap-samples 150",
            lambda run: comparison(run)["num_bootstrap_samples"],
            150,
        )
    ],
    "fp16": [
        Case(
            "",
            "--fp16",
            lambda run: [note for note in run.read("environment.json")["plan_notes"] if "fp16" in note],
        )
    ],
}
IN_TESTS_OF_THEIR_OWN = {
    "participants_per_step",
    "fisher_batch_size",
    "merge_gate",
    "gate_tolerance",
    "max_merge_frequency",
    "merge_timeout",
    "max_merge_attempts",
    "enable_auto_recovery",
}
"""In test_iterative_options_alone.py."""


def test_every_option_has_a_test():
    options = {*IterativeOptions.model_fields, *HalfPrecisionOptions.model_fields}
    assert options == {*CASES, *IN_TESTS_OF_THEIR_OWN}
    others = Path(__file__).with_name("test_iterative_options_alone.py").read_text()
    flags = set(re.findall(r'"--([a-z-]+)"', others))
    assert {option.replace("_", "-") for option in IN_TESTS_OF_THEIR_OWN} <= flags


@pytest.mark.parametrize(
    ("option", "number"),
    [
        pytest.param(option, number, marks=[pytest.mark.slow] * (number > 0))
        for option, cases in CASES.items()
        for number in range(len(cases))
    ],
)
def test_an_option_changes_what_it_names(iterated, option, number):
    case = CASES[option][number]
    assert f"--{option.replace('_', '-')}" in case.added
    without, given = iterated(*case.base.split()), iterated(*together(case.base, case.added))
    assert case.seen(given) != case.seen(without)
    if case.expected is not ANYTHING:
        assert case.seen(given) == case.expected
