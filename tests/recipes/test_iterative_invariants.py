"""What must hold of iterative training whatever it is used for: to the bit, where that is what is promised."""

import numpy as np
import pytest
import torch
from torch import Tensor

ALONE = ("--merge-frequency", 9)
"""No merge in two epochs."""
AVERAGE = ("--weight-calculation", "average")
FULL = ("--finetuning", "full")


def midpoints(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean in float64, rounded once."""
    return {name: ((left[name].double() + right[name].double()) / 2).to(left[name].dtype) for name in left}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("how", [FULL, ("--lora-merge", "factors")], ids=["full", "factors"])
def test_two_locales_average_is_the_exact_midpoint(iterated, how):
    apart = iterated(*(FULL if how == FULL else ()), *ALONE, "--max-epochs", 1)
    merged = iterated(*how, *AVERAGE, "--max-epochs", 1)
    expected = midpoints(apart.tensors("en-US"), apart.tensors("fr-FR"))
    for locale in ("en-US", "fr-FR"):
        assert_equal(merged.tensors(locale), expected)
    (folder,) = (merged.folder / "merged_models").iterdir()
    assert_equal(merged.tensors("merged_models", folder.name), expected)
    assert any(not torch.equal(expected[name], apart.tensors("en-US")[name]) for name in expected)


def test_svd_merges_products(iterated):
    """The products B A of two adapters of rank 2: their mean has rank 4, and rank 4 holds it to rounding."""
    rank = ("--lora-r", 4, "--max-epochs", 1)
    apart, merged = iterated(*rank, *ALONE), iterated(*rank, *AVERAGE)
    product_of = {name: run.tensors(name) for name, run in (("en-US", apart), ("fr-FR", apart))}
    product_of["merged"] = merged.tensors("en-US")
    modules = [name for name in product_of["merged"] if name.endswith("lora_A.weight")]
    assert modules
    for name in modules:
        other = name.replace("lora_A", "lora_B")
        en, fr, found = (state[other].double() @ state[name].double() for state in product_of.values())
        mean = (en + fr) / 2
        best = torch.linalg.svdvals(mean)[4:].square().sum().sqrt()  # Eckart-Young: no rank 4 is nearer
        assert (found - mean).norm() <= best + 1e-5 * mean.norm()


@pytest.mark.parametrize("how", [(), pytest.param(FULL, marks=pytest.mark.slow)], ids=["lora", "full"])
@pytest.mark.parametrize("optimizer", ["keep", "merge"])
def test_a_merge_of_one_is_no_merge(iterated, how, optimizer):
    one = ("--locales", "en-US", *how)
    merged, apart = iterated(*one, "--optimizer-on-merge", optimizer), iterated(*one, *ALONE)
    assert merged.merge_epochs == [1, 2]
    assert merged.weights == apart.weights
    assert merged.losses("en-US") == apart.losses("en-US")


def test_a_reset_optimizer_is_another_training(iterated):
    one = ("--locales", "en-US")
    reset, apart = iterated(*one, "--optimizer-on-merge", "reset"), iterated(*one, *ALONE)
    assert reset.losses("en-US")[:3] == apart.losses("en-US")[:3]  # up to the first step after the merge
    assert reset.losses("en-US")[3] != apart.losses("en-US")[3]


def test_a_mixture_of_oneself_is_no_merge(iterated):
    own, apart = iterated("--merge-scope", "each", "--similarity-top-k", 1), iterated(*ALONE)
    assert own.merge_epochs == [1, 2]
    assert own.weights == apart.weights


@pytest.mark.parametrize("how", [(), pytest.param(FULL, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_without_a_merge_it_is_the_own_training(iterated, how):
    """The baseline, trained for the comparison after all else, has the bits of the participant that never merged."""
    run = iterated(*how, *ALONE, "--baselines")
    assert run.merge_epochs == []
    for locale in ("en-US", "fr-FR"):
        iterative = np.load(run.folder / "comparison" / "iterative" / locale / f"{locale}.npz")
        own = np.load(run.folder / "comparison" / "own_training" / locale / f"{locale}.npz")
        assert set(iterative.files) == set(own.files) == {"loss", "weight", "expected", "predicted"}
        for name in iterative.files:
            assert iterative[name].tobytes() == own[name].tobytes()
    assert set(run.read("final_statistics.json")["verdicts"].values()) == {"no difference"}


def test_locales_that_do_not_merge_do_not_know_each_other(iterated):
    together, alone = iterated(*ALONE), iterated("--locales", "fr-FR", *ALONE)
    assert together.weights["fr-FR"] == alone.weights["fr-FR"]


def test_scope_target_makes_all_equal_and_scope_each_keeps_them_apart(iterated):
    target, each = iterated(), iterated("--merge-scope", "each")
    assert target.weights["en-US"] == target.weights["fr-FR"]
    assert each.weights["en-US"] != each.weights["fr-FR"]
    for locale in ("en-US", "fr-FR"):  # of each its own share is the largest
        shares = each.mixtures[0][locale]
        assert max(shares, key=lambda name: shares[name]) == locale


def test_a_rejected_merge_leaves_no_trace(iterated, contrary):
    """The merged model is fr-FR's; en-US, where it is all wrong, keeps its own and goes on as if nothing had been."""
    options = (*contrary, "--max-epochs", 6)
    fr_only = (
        "--weight-calculation",
        "manual",
        "--manual-weights",
        "en-US=0,fr-FR=1",
        "--merge-frequency",
        4,
    )
    gated = iterated(*options, *fr_only, "--merge-gate")
    (merge,) = gated.merges
    assert merge["gate"] == {"en-US": "rejected", "fr-FR": "accepted"}
    assert merge["before"]["en-US"]["accuracy"] == 1.0
    assert merge["after"]["en-US"]["accuracy"] == 0.0
    apart = iterated(*options, *ALONE)
    assert gated.weights == apart.weights
    for locale in ("en-US", "fr-FR"):
        assert gated.losses(locale) == apart.losses(locale)
    open_gate = iterated(*options, *fr_only)
    assert open_gate.weights["en-US"] != apart.weights["en-US"]
    assert open_gate.weights["fr-FR"] == apart.weights["fr-FR"]


def test_what_an_early_stop_leaves(iterated):
    """Who stops early still gives to merges, gets none after the epoch it stopped in, and keeps its model."""
    options = (
        "--max-epochs",
        4,
        "--merge-frequency",
        4,
        "--batch-size",
        24,
        "--metric",
        "loss",
        "--learning-rate",
        "1e-4",
    )
    run = iterated(*options, "--early-stopping-patience", 1)
    stopped = run.read("training_history.json")["rounds"][-1]["stopped"]
    assert list(stopped) == ["en-US"]
    (merge,) = run.merges
    assert merge["participants"] == ["en-US", "fr-FR"]
    assert list(merge["gate"]) == ["fr-FR"]
    assert merge["path"]
    assert run.weights["en-US"] != run.weights["fr-FR"]
