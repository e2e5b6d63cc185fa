"""The honest comparison: verdicts that are right as often as they claim, signs, seeds, the table."""

import json
import math

import numpy as np
import pytest

from toolkit.errors import RunError
from toolkit.evaluation.outcomes import RowOutcomes
from toolkit.reporting.round_wording import comparison_lines
from toolkit.rounds.comparison import (
    ARMS,
    COLUMNS,
    LEAST_ROWS,
    best_source,
    compare,
    comparison_record,
    notes,
    table_rows,
)


def rows(correct: np.ndarray) -> RowOutcomes:
    """A classifier of two labels that is right where ``correct`` says so."""
    expected = np.arange(len(correct)) % 2
    predicted = np.where(correct, expected, 1 - expected)
    return RowOutcomes(
        loss=np.where(correct, 0.1, 2.0), weight=np.ones(len(correct)), expected=expected, predicted=predicted
    )


def right(num_right: int, num_rows: int = 200) -> RowOutcomes:
    return rows(np.arange(num_rows) < num_right)


def arms(own: RowOutcomes, iterative: RowOutcomes, **more: RowOutcomes) -> dict[str, list[RowOutcomes]]:
    return {
        arm: [outcomes] for arm, outcomes in {"own_training": own, "iterative": iterative, **more}.items()
    }


def run(outcomes, metric="accuracy", **options) -> dict:
    options = {"num_samples": 1000, "seed": 0} | options
    found = compare(outcomes, metric=metric, **options)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


@pytest.mark.parametrize(
    ("own", "iterative", "verdict"),
    [(120, 150, "helped"), (150, 120, "hurt"), (150, 150, "no difference"), (150, 152, "no difference")],
)
def test_verdicts(own: int, iterative: int, verdict: str) -> None:
    found = run({"sq-AL": arms(right(own), right(iterative))})["participants"]["sq-AL"]
    improvement = found["improvement_over"]["own_training"]
    assert improvement["value"] == pytest.approx((iterative - own) / 200)
    assert improvement["low"] <= improvement["value"] <= improvement["high"]
    assert found["verdict"] == verdict
    assert found["arms"]["iterative"]["value"] == iterative / 200
    assert found["num_rows"] == 200


@pytest.mark.parametrize("metric", ["accuracy", "f1", "loss"])
def test_better_is_positive_whatever_the_metric(metric: str) -> None:
    found = run({"fr-FR": arms(right(100), right(180)), "de-DE": arms(right(180), right(100))}, metric)
    assert found["higher_is_better"] == (metric != "loss")
    assert found["participants"]["fr-FR"]["verdict"] == "helped"
    assert found["participants"]["de-DE"]["verdict"] == "hurt"
    assert found["participants"]["fr-FR"]["improvement_over"]["own_training"]["value"] > 0
    assert found["num_verdicts"] == {"helped": 1, "hurt": 1, "no difference": 0}
    assert found["overall"]["verdict"] == "no difference"


def test_verdicts_are_wrong_about_as_often_as_they_say() -> None:
    # Two models that are equally good on independent rows: about 5 % of the verdicts find a difference all the same.
    generator = np.random.default_rng(0)
    num_locales, num_wrong = 400, 0
    for i in range(num_locales):
        both = [rows(generator.random(150) < 0.8) for _ in range(2)]
        found = compare({f"l{i}": arms(*both)}, metric="accuracy", num_samples=400, seed=i)
        num_wrong += found["participants"][f"l{i}"]["verdict"] != "no difference"
    # Binomial(400, 0.05): mean 20, standard deviation 4.4.
    assert 6 <= num_wrong <= 37


def test_a_real_difference_is_mostly_found() -> None:
    generator = np.random.default_rng(1)
    num_found = 0
    for i in range(100):
        own, iterative = rows(generator.random(300) < 0.75), rows(generator.random(300) < 0.87)
        found = compare({"x": arms(own, iterative)}, metric="accuracy", num_samples=400, seed=i)
        num_found += found["participants"]["x"]["verdict"] == "helped"
    assert num_found >= 90


def test_few_rows_are_never_called_a_difference() -> None:
    found = run({"sq-AL": arms(right(0, LEAST_ROWS - 1), right(LEAST_ROWS - 1, LEAST_ROWS - 1))})
    assert found["participants"]["sq-AL"]["verdict"] == "no difference"
    assert any("sq-AL" in line and "held-out rows" in line for line in notes(found))
    found = run({"sq-AL": arms(right(0, LEAST_ROWS), right(LEAST_ROWS, LEAST_ROWS))})
    assert found["participants"]["sq-AL"]["verdict"] == "helped"


# --- seeds


def test_seeds_that_disagree_widen_the_interval() -> None:
    agreeing = {"x": {"own_training": [right(140)] * 3, "iterative": [right(160)] * 3}}
    disagreeing = {"x": {"own_training": [right(140)] * 3, "iterative": [right(n) for n in (120, 160, 200)]}}
    sure, unsure = (run(o)["participants"]["x"] for o in (agreeing, disagreeing))
    assert sure["improvement_over"]["own_training"]["value"] == pytest.approx(0.1)
    assert unsure["improvement_over"]["own_training"]["value"] == pytest.approx(0.1)
    assert (sure["verdict"], unsure["verdict"]) == ("helped", "no difference")
    assert unsure["arms"]["iterative"]["by_seed"] == [0.6, 0.8, 1.0]
    assert run(agreeing)["num_seeds"] == 3


def test_seeds_are_paired_between_the_arms() -> None:
    # The seed matters much, and for both arms alike: the improvement is the same with every seed.
    by_seed = {
        "own_training": [right(n) for n in (80, 120, 160)],
        "iterative": [right(n) for n in (100, 140, 180)],
    }
    found = run({"x": by_seed})["participants"]["x"]
    assert found["verdict"] == "helped"
    improvement, arm = found["improvement_over"]["own_training"], found["arms"]["iterative"]
    assert improvement["high"] - improvement["low"] < (arm["high"] - arm["low"]) / 2


def test_equal_numbers_of_seeds() -> None:
    with pytest.raises(RunError, match=r"arms with \[1, 2\] seeds"):
        run({"x": {"own_training": [right(1)] * 2, "iterative": [right(1)]}})


# --- rows


def test_arms_on_other_rows_are_refused() -> None:
    mirrored = rows(np.ones(200, bool))
    assert mirrored.expected is not None
    other = RowOutcomes(
        loss=mirrored.loss,
        weight=mirrored.weight,
        expected=1 - mirrored.expected,
        predicted=mirrored.predicted,
    )
    for wrong in (right(5, 100), other, RowOutcomes(loss=np.ones(200), weight=np.ones(200))):
        with pytest.raises(RunError, match="sq-AL were not measured on the same rows"):
            run({"sq-AL": arms(right(100), wrong)})
    with pytest.raises(RunError, match="nothing was measured for sq-AL"):
        run({"sq-AL": {}})
    with pytest.raises(RunError, match="nothing was measured for sq-AL"):
        run({"sq-AL": arms(right(0, 0), right(0, 0))})


def test_another_locale_changes_nothing_for_a_locale() -> None:
    alone = run({"sq-AL": arms(right(120), right(130))})["participants"]["sq-AL"]
    beside = run({"fr-FR": arms(right(10), right(20)), "sq-AL": arms(right(120), right(130))})["participants"]
    assert beside["sq-AL"] == alone


def test_the_seed_and_the_samples_are_those_given() -> None:
    outcomes = {"x": arms(right(120), right(130))}
    one, again, other = run(outcomes), run(outcomes), run(outcomes, seed=1)
    assert one == again
    assert one["participants"] != other["participants"]
    assert (one["bootstrap_seed"], other["bootstrap_seed"]) == (0, 1)
    assert run(outcomes, num_samples=500)["num_bootstrap_samples"] == 500
    assert run(outcomes, num_samples=500)["participants"] != one["participants"]


# --- arms that are missing or broken


def test_a_locale_without_its_own_training_has_no_verdict() -> None:
    found = run({"xx": {"iterative": [right(100)], "base": [right(20)]}, "yy": arms(right(100), right(100))})
    assert found["participants"]["xx"]["verdict"] is None
    assert found["participants"]["xx"]["improvement_over"]["base"]["value"] == pytest.approx(0.4)
    assert found["overall"]["participants"] == ["yy"]
    assert found["num_verdicts"] == {"helped": 0, "hurt": 0, "no difference": 1}
    assert [row[0] for row in table_rows(found)] == ["yy", "xx"]
    record = comparison_record(found)
    assert list(record.verdicts) == ["yy"]


def test_an_arm_that_is_not_finite_is_left_out_and_named() -> None:
    broken = RowOutcomes(loss=np.full(50, math.nan), weight=np.ones(50))
    whole = RowOutcomes(loss=np.ones(50), weight=np.ones(50))
    found = run({"sq-AL": arms(whole, whole, last_merge=broken)}, "loss")
    assert found["participants"]["sq-AL"]["verdict"] == "no difference"
    assert found["participants"]["sq-AL"]["not_finite"] == ["last_merge"]
    assert "last_merge" not in found["participants"]["sq-AL"]["arms"]
    assert any("sq-AL last_merge" in line for line in notes(found))
    found = run({"sq-AL": arms(broken, broken)}, "loss")
    assert found["participants"]["sq-AL"]["verdict"] is None
    assert table_rows(found) == [["sq-AL", *"-------"]]


def test_nothing_to_compare() -> None:
    found = run({})
    assert found["participants"] == {}
    assert table_rows(found) == []


# --- overall


def test_overall_is_the_mean_over_locales() -> None:
    # Ten locales with a small improvement each: none shows it alone, all together do.
    generator = np.random.default_rng(2)
    outcomes = {}
    for i in range(10):
        wrong = generator.permutation(200)
        own = np.isin(np.arange(200), wrong[:60], invert=True)
        fixed, broken = wrong[:12], wrong[60:66]
        iterative = own.copy()
        iterative[fixed], iterative[broken] = True, False
        outcomes[f"l{i}"] = arms(rows(own), rows(iterative))
    found = run(outcomes)
    assert found["num_verdicts"]["no difference"] == 10
    assert found["overall"]["improvement_over"]["own_training"]["value"] == pytest.approx(0.03)
    assert found["overall"]["verdict"] == "helped"
    assert found["overall"]["arms"]["own_training"] == pytest.approx(0.7)


def test_every_locale_draws_its_own_rows() -> None:
    # Were the same row numbers drawn everywhere, thirty locales would be no surer than one.
    def width(num_locales: int) -> float:
        outcomes = {f"l{i}": arms(right(100), right(120)) for i in range(num_locales)}
        found = run(outcomes)["overall"]["improvement_over"]["own_training"]
        return found["high"] - found["low"]

    assert width(30) < width(1) / 3


def test_a_seed_is_drawn_for_all_locales_at_once() -> None:
    # Good and bad seeds are the same ones everywhere: more locales say nothing more about seeds.
    by_seed = {"own_training": [right(100)] * 3, "iterative": [right(n) for n in (70, 110, 150)]}

    def width(num_locales: int) -> float:
        found = run({f"l{i}": by_seed for i in range(num_locales)})["overall"]["improvement_over"][
            "own_training"
        ]
        return found["high"] - found["low"]

    assert width(30) > 0.9 * width(2)


# --- the best source


def test_the_best_source() -> None:
    candidates = {"en-US": right(100), "fr-FR": right(150), "de-DE": right(150)}
    assert best_source(candidates, "accuracy") == "fr-FR"
    assert best_source(candidates, "loss") == "fr-FR"
    assert best_source({}, "accuracy") is None


# --- the table


def test_the_table() -> None:
    full = {arm: [right(n)] for arm, n in zip(ARMS, (10, 100, 110, 60, 150), strict=True)}
    found = run({"sq-AL": full, "fr-FR": arms(right(100), right(101))}, best_sources={"sq-AL": "it-IT"})
    first, second, mean = table_rows(found)
    assert len(first) == len(second) == len(mean) == len(COLUMNS)
    assert first[:6] == ["sq-AL", "0.0500", "0.5000", "0.5500", "0.3000 it-IT", "0.7500"]
    assert first[6].startswith("+0.2500 [+0.1")
    assert first[7] == "helped"
    assert second[:6] == ["fr-FR", "-", "0.5000", "-", "-", "0.5050"]
    # The mean only has the arms that every locale has.
    assert mean[:6] == ["mean", "-", "0.5000", "-", "-", "0.6275"]
    lines = comparison_lines(comparison_record(found))
    assert (
        " ".join(lines[0].split())
        == "locale base own training last merge best source iterative improvement verdict"
    )
    assert any("higher is better" in line and "1000 samples" in line for line in lines)
    assert any("one seed" in line for line in lines)
    assert any("best source was chosen on these rows" in line for line in lines)
