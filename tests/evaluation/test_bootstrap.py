"""The bootstrap: against formulas of statistics, and what pairing means."""

import numpy as np
import pytest

from toolkit.evaluation.bootstrap import interval, metric_value, resampled_metric, resampled_seeds
from toolkit.evaluation.outcomes import RowOutcomes, metrics


def classifier(num_rows: int, accuracy: float, seed: int, num_labels: int = 6) -> RowOutcomes:
    generator = np.random.default_rng(seed)
    expected = np.random.default_rng(99).integers(num_labels, size=num_rows)
    wrong = (expected + generator.integers(1, num_labels, size=num_rows)) % num_labels
    predicted = np.where(generator.random(num_rows) < accuracy, expected, wrong)
    return RowOutcomes(
        loss=generator.random(num_rows), weight=np.ones(num_rows), expected=expected, predicted=predicted
    )


def language_model(num_rows: int, mean: float, seed: int) -> RowOutcomes:
    generator = np.random.default_rng(seed)
    weight = np.random.default_rng(7).integers(1, 40, size=num_rows).astype(float)
    return RowOutcomes(loss=mean + generator.standard_normal(num_rows) / 10, weight=weight)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "loss"])
def test_the_estimate_is_the_metric_of_the_evaluation(metric) -> None:
    outcomes = classifier(200, 0.7, 1)
    assert metric_value(outcomes, metric) == pytest.approx(metrics(outcomes)[metric], rel=1e-13)
    text = language_model(50, 2.0, 1)
    assert metric_value(text, "loss") == pytest.approx(metrics(text)["loss"], rel=1e-13)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "loss"])
def test_samples_are_metrics_of_drawn_rows(metric) -> None:
    outcomes = classifier(40, 0.6, 1)
    (samples,) = resampled_metric([outcomes], metric, num_samples=50, seed=3)
    generator = np.random.default_rng(3)
    for sample, rows in zip(samples, generator.integers(40, size=(50, 40)), strict=True):
        assert outcomes.expected is not None
        assert outcomes.predicted is not None
        drawn = RowOutcomes(
            loss=outcomes.loss[rows],
            weight=outcomes.weight[rows],
            expected=outcomes.expected[rows],
            predicted=outcomes.predicted[rows],
        )
        assert sample == pytest.approx(metrics(drawn)[metric], rel=1e-12)


def test_the_weights_of_rows_count() -> None:
    outcomes = RowOutcomes(loss=np.array([1.0, 3.0]), weight=np.array([3.0, 1.0]))
    assert metric_value(outcomes, "loss") == 1.5
    (samples,) = resampled_metric([outcomes], "loss", num_samples=200, seed=0)
    assert set(samples.round(12)) == {1.0, 1.5, 3.0}


def test_rows_without_weight_alone_have_the_metric_of_all() -> None:
    outcomes = RowOutcomes(loss=np.array([0.0, 2.0]), weight=np.array([0.0, 5.0]))
    (samples,) = resampled_metric([outcomes], "loss", num_samples=100, seed=0)
    assert set(samples) == {2.0}


def test_the_spread_of_a_proportion() -> None:
    # Standard error of a proportion p over N rows: sqrt(p (1 - p) / N); 20,000 samples: 2 % of that.
    outcomes = classifier(400, 0.8, 5)
    p = metric_value(outcomes, "accuracy")
    (samples,) = resampled_metric([outcomes], "accuracy", num_samples=20_000, seed=1)
    assert samples.std() == pytest.approx((p * (1 - p) / 400) ** 0.5, rel=0.03)
    assert samples.mean() == pytest.approx(p, abs=0.001)
    found = interval(p, samples)
    assert found.value == p
    assert found.low == pytest.approx(p - 1.96 * samples.std(), abs=0.004)
    assert found.high == pytest.approx(p + 1.96 * samples.std(), abs=0.004)
    assert interval(p, samples, 0.5).high < found.high


def test_models_are_paired() -> None:
    # Right on the same rows but for ten: the difference varies far less than each of the two.
    worse = classifier(500, 0.7, 2)
    assert worse.expected is not None
    assert worse.predicted is not None
    repaired = worse.predicted.copy()
    wrong = np.flatnonzero(worse.expected != worse.predicted)[:10]
    repaired[wrong] = worse.expected[wrong]
    better = RowOutcomes(loss=worse.loss, weight=worse.weight, expected=worse.expected, predicted=repaired)
    a, b = resampled_metric([worse, better], "accuracy", num_samples=2000, seed=4)
    assert (b >= a).all()
    assert (b - a).std() == pytest.approx((0.02 * 0.98 / 500) ** 0.5, rel=0.1)
    assert (b - a).std() < a.std() / 2


def test_the_same_seed_draws_the_same_rows() -> None:
    outcomes = classifier(100, 0.6, 1)

    def draw(seed):
        return resampled_metric([outcomes], "accuracy", num_samples=30, seed=seed)

    assert (draw(1) == draw(1)).all()
    assert not (draw(1) == draw(2)).all()
    # Another model beside it changes nothing.
    beside = resampled_metric([classifier(100, 0.2, 8), outcomes], "accuracy", num_samples=30, seed=1)
    assert (beside[1] == draw(1)[0]).all()


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = classifier(50, 0.6, 1)
    whole = resampled_metric([outcomes], "f1", num_samples=41, seed=1)
    monkeypatch.setattr("toolkit.evaluation.bootstrap.MAX_COUNTS", 50 * 7)
    np.testing.assert_allclose(resampled_metric([outcomes], "f1", num_samples=41, seed=1), whole, rtol=1e-14)


def test_seeds() -> None:
    assert (resampled_seeds(1, 5, 0) == 1).all()
    weights = resampled_seeds(3, 4000, 0)
    assert weights.shape == (3, 4000)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-15)
    np.testing.assert_allclose(weights.mean(axis=1), 1 / 3, atol=0.01)
    assert set((weights * 3).round(12).ravel()) == {0, 1, 2, 3}


def test_what_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="same rows"):
        resampled_metric([classifier(5, 1, 1), classifier(6, 1, 1)], "loss", num_samples=3, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        resampled_metric([RowOutcomes(loss=np.zeros(0), weight=np.zeros(0))], "loss", num_samples=3, seed=0)
    with pytest.raises(ValueError, match="language model"):
        resampled_metric([language_model(5, 1, 1)], "accuracy", num_samples=3, seed=0)
