"""The frequency that follows the results: moves, bounds, triggers, resumption."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.config.recipes import IterativeConfig
from toolkit.rounds.schedule import (
    AdaptiveMergeScheduler,
    MergeDecision,
    Observation,
    Schedule,
    build_schedule,
)
from toolkit.rounds.schedule.progress import ScoreWindows

LOCALES = ["en-US", "fr-FR"]


def observe(of: Schedule, epoch: int, *scores: float | None) -> None:
    of.observe(
        [
            Observation(participant=name, epoch=epoch, train_loss=1.0, metrics={}, score=score)
            for name, score in zip(LOCALES, scores, strict=False)
        ]
    )


def run(
    of: Schedule, scores: list[tuple[float | None, ...]], first: int = 1
) -> list[tuple[int, MergeDecision]]:
    """Epoch by epoch as the loop does it; the merges that were made."""
    merges = []
    for epoch, of_epoch in enumerate(scores, start=first):
        observe(of, epoch, *of_epoch)
        decision = of.decide(epoch, LOCALES)
        if decision.should_merge:
            of.record_merge(epoch, dict.fromkeys(LOCALES, True))
            merges.append((epoch, decision))
    return merges


def flat(num_epochs: int) -> list[tuple[float, ...]]:
    return [(0.9, 0.9)] * num_epochs


def straight(num_epochs: int) -> list[tuple[float, ...]]:
    return [(0.01 * epoch, 0.01 * epoch) for epoch in range(num_epochs)]


def test_the_example_of_the_documentation() -> None:
    scheduler = AdaptiveMergeScheduler(
        base_merge_frequency=3, convergence_threshold=1e-4, min_merge_frequency=1, max_merge_frequency=10
    )
    decision = scheduler.evaluate_merge_necessity(current_epoch=5, active_locales=["en-US", "fr-FR"])
    assert decision.should_merge
    assert decision.reason == "5 epochs since the last merge; every 3"
    assert decision.trigger == "frequency"
    assert decision.recommended_frequency == 3
    assert not scheduler.evaluate_merge_necessity(
        current_epoch=2, active_locales=["en-US", "fr-FR"]
    ).should_merge


def test_without_evaluations_it_is_a_fixed_frequency() -> None:
    merges = run(AdaptiveMergeScheduler(), [(None, None)] * 10)
    assert [epoch for epoch, _ in merges] == [3, 6, 9]
    assert {decision.trigger for _, decision in merges} == {"frequency"}


def test_on_a_plateau_merges_come_more_often() -> None:
    scheduler = AdaptiveMergeScheduler(5)
    merges = run(scheduler, flat(12))
    # The window is full after epoch 3: every 4, 3, 2, 1 epochs after epochs 3, 4, 5, 6.
    assert [epoch for epoch, _ in merges] == [3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert merges[0][1].trigger == "convergence"
    assert merges[1][1].trigger == "adaptive"
    assert "100% of the participants are on a plateau" in merges[1][1].reason
    assert scheduler.effective_frequency == 1


def test_moves_add_up_and_stop_at_the_minimum() -> None:
    scheduler = AdaptiveMergeScheduler(6, min_merge_frequency=4)
    seen = []
    for epoch in range(1, 8):
        observe(scheduler, epoch, 0.9, 0.9)
        seen.append(scheduler.decide(epoch, LOCALES).recommended_frequency)
    assert seen == [6, 6, 5, 4, 4, 4, 4]


def test_rising_moves_up_once_between_two_merges() -> None:
    scheduler = AdaptiveMergeScheduler(3)
    merges = run(scheduler, straight(22))
    # In the first window (epochs 1 to 3) there is nothing to compare with; from then on one epoch more each time.
    assert [epoch for epoch, _ in merges] == [3, 7, 12, 18]
    assert [d.recommended_frequency for _, d in merges] == [3, 4, 5, 6]
    assert "100% of the participants are rising" in merges[1][1].reason


def test_moves_stop_at_the_maximum() -> None:
    scheduler = AdaptiveMergeScheduler(3, max_merge_frequency=4)
    merges = run(scheduler, straight(20))
    assert [epoch for epoch, _ in merges] == [3, 7, 11, 15, 19]


def test_slower_than_in_the_beginning_but_no_plateau_moves_nothing() -> None:
    # Gains of 0.01 per evaluation, then of 0.003: less than half, more than a tenth.
    scores = [0.1, 0.11, 0.12, 0.123, 0.126, 0.129, 0.132]
    scheduler = AdaptiveMergeScheduler(7)
    for epoch, score in enumerate(scores, start=1):
        observe(scheduler, epoch, score, score)
    decision = scheduler.decide(6, LOCALES)
    # Epoch 4's window still begins at 0.11 with a gain of 0.0065: rising, one epoch more.
    assert decision.recommended_frequency == 8
    assert decision.metrics["share_rising"] == 0
    assert decision.metrics["share_on_plateau"] == 0
    assert decision.metrics["mean_gain"] == pytest.approx(0.003)
    assert decision.metrics["mean_trend"] == pytest.approx(0.003)


def test_a_tenth_of_the_first_gain_is_a_plateau_whatever_the_threshold() -> None:
    scheduler = AdaptiveMergeScheduler(9, convergence_threshold=1e-9)
    for epoch, score in enumerate([0.1, 0.2, 0.3, 0.305, 0.31, 0.315], start=1):
        observe(scheduler, epoch, score, score)
    metrics = scheduler.decide(6, LOCALES).metrics
    assert metrics["share_on_plateau"] == 1
    assert metrics["share_converged"] == 0


def test_half_of_the_participants_are_enough() -> None:
    scheduler = AdaptiveMergeScheduler(6)
    for epoch in range(1, 5):
        observe(scheduler, epoch, 0.9, 0.1 * epoch)
    assert scheduler.effective_frequency == 4
    metrics = scheduler.decide(4, LOCALES).metrics
    assert metrics["share_on_plateau"] == 0.5
    assert metrics["share_rising"] == 0.5


def test_falling_is_a_plateau() -> None:
    scheduler = AdaptiveMergeScheduler(6)
    for epoch in range(1, 4):
        observe(scheduler, epoch, 1 - 0.1 * epoch, 1 - 0.1 * epoch)
    assert scheduler.effective_frequency == 5
    assert scheduler.decide(3, LOCALES).metrics["mean_trend"] == pytest.approx(-0.1)


def test_a_peak_in_the_middle_of_a_fall_is_no_rise() -> None:
    scheduler = AdaptiveMergeScheduler(6)
    for epoch, score in enumerate([0.1, 0.2, 0.3, 0.4, 0.6, 0.3], start=1):
        observe(scheduler, epoch, score, score)
    metrics = scheduler.decide(6, LOCALES).metrics
    assert metrics["mean_gain"] == pytest.approx(0.1)  # as in the first window
    assert metrics["mean_trend"] == pytest.approx(-0.05)
    assert metrics["share_rising"] == 0


def test_merges_that_are_turned_down_become_rarer() -> None:
    scheduler = AdaptiveMergeScheduler(3)
    scheduler.record_merge(3, {"en-US": False, "fr-FR": False})
    assert scheduler.effective_frequency == 4
    assert "0 of 2 participants took the last merge over" in scheduler.decide(7, LOCALES).reason
    scheduler.record_merge(7, {"en-US": True, "fr-FR": False})
    assert scheduler.effective_frequency == 4
    scheduler.record_merge(11, {})
    assert scheduler.effective_frequency == 4


# --- convergence


def test_converged_means_that_the_improvement_is_below_the_threshold() -> None:
    still, moving = (
        [(0.9, 0.9), (0.90005, 0.90005), (0.9001, 0.9001)],
        [(0.9, 0.9), (0.91, 0.91), (0.92, 0.92)],
    )
    scheduler = AdaptiveMergeScheduler(10, convergence_threshold=1e-4)
    ((epoch, decision),) = run(scheduler, still)
    assert (epoch, decision.trigger, decision.confidence) == (3, "convergence", 1.0)
    assert run(AdaptiveMergeScheduler(10, convergence_threshold=1e-4), moving) == []
    # 0.00005 per evaluation is an improvement where the threshold is lower, and 0.01 none where it is higher.
    assert run(AdaptiveMergeScheduler(10, convergence_threshold=1e-6), still) == []
    assert run(AdaptiveMergeScheduler(10, convergence_threshold=0.05), moving)[0][0] == 3


def test_worse_than_before_counts_as_converged() -> None:
    ((epoch, decision),) = run(AdaptiveMergeScheduler(10), [(0.9, 0.9), (0.8, 0.8), (0.7, 0.7)])
    assert (epoch, decision.trigger) == (3, "convergence")


def test_all_must_have_converged() -> None:
    assert run(AdaptiveMergeScheduler(10), [(0.9, 0.1), (0.9, 0.2), (0.9, 0.3)]) == []


def test_one_that_has_stopped_does_not_keep_the_others_waiting() -> None:
    scheduler = AdaptiveMergeScheduler(10)
    observe(scheduler, 1, 0.1, 0.5)
    for epoch in (2, 3):
        observe(scheduler, epoch, 0.9, 0.5 + 0.1 * epoch)
    for epoch in (4, 5):
        observe(scheduler, epoch, 0.9)
    assert scheduler.decide(5, LOCALES).trigger == "convergence"


def test_convergence_is_judged_on_evaluations_since_the_last_merge() -> None:
    scheduler = AdaptiveMergeScheduler(10, min_merge_frequency=1)
    assert run(scheduler, flat(3))[0][0] == 3
    for epoch in (4, 5):
        observe(scheduler, epoch, 0.9, 0.9)
        assert not scheduler.decide(epoch, LOCALES).should_merge
    observe(scheduler, 6, 0.9, 0.9)
    assert scheduler.decide(6, LOCALES).trigger == "convergence"


def test_never_within_the_minimum() -> None:
    scheduler = AdaptiveMergeScheduler(10, min_merge_frequency=5, performance_trigger=True)
    merges = run(scheduler, [*flat(4), (0.5, 0.5), *flat(8)])
    assert merges[0][0] == 5
    assert all(b - a >= 5 for (a, _), (b, _) in itertools.pairwise(merges))
    decision = AdaptiveMergeScheduler(10, min_merge_frequency=5).decide(3, LOCALES)
    assert "at least 5" in decision.reason


# --- the other options


def test_every_option_of_the_recipe_reaches_the_schedule() -> None:
    options = {"adaptive_merge_frequency": True, "merge_frequency": 6}

    def frequencies(scores: list[tuple[float, ...]], **more) -> list[int]:
        scheduler = build_schedule(IterativeConfig(locales=LOCALES, **(options | more)))
        found = []
        for epoch, of_epoch in enumerate(scores, start=1):
            observe(scheduler, epoch, *of_epoch)
            found.append(scheduler.decide(epoch, LOCALES).recommended_frequency)
        return found

    assert frequencies(flat(6)) == [6, 6, 5, 4, 3, 2]
    assert frequencies(flat(6), merge_frequency=8) == [8, 8, 7, 6, 5, 4]
    assert frequencies(flat(6), min_merge_frequency=5) == [6, 6, 5, 5, 5, 5]
    assert frequencies(flat(6), adaptive_window=5) == [6, 6, 6, 6, 5, 4]
    assert frequencies(straight(6)) == [6, 6, 6, 7, 7, 7]
    assert frequencies(straight(6), max_merge_frequency=6) == [6] * 6
    assert frequencies(straight(6), convergence_threshold=0.5) == [6, 6, 5, 4, 3, 2]


def test_the_performance_trigger_is_an_option() -> None:
    options = {"adaptive_merge_frequency": True, "merge_frequency": 10, "locales": LOCALES}
    falling = [(0.5, 0.5), (0.6, 0.6), (0.7, 0.55)]
    assert run(build_schedule(IterativeConfig(**options)), falling) == []
    scheduler = build_schedule(IterativeConfig(**options, performance_merge_trigger=True))
    ((epoch, decision),) = run(scheduler, falling)
    assert (epoch, decision.trigger, decision.confidence) == (3, "performance", 0.5)
    assert decision.metrics["num_troubled"] == 1


def test_bounds_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="between 5 and 4"):
        AdaptiveMergeScheduler(5, min_merge_frequency=5, max_merge_frequency=4)
    with pytest.raises(ValueError, match="between 0 and 4"):
        AdaptiveMergeScheduler(3, min_merge_frequency=0, max_merge_frequency=4)
    with pytest.raises(ValueError, match="window of 1"):
        AdaptiveMergeScheduler(window=1)


def test_nobody_there() -> None:
    assert not AdaptiveMergeScheduler().decide(9, []).should_merge


# --- windows by hand


def test_progress_by_hand() -> None:
    windows = ScoreWindows(3, 1e-4)
    for epoch, score in enumerate([0.1, 0.5, 0.4, 0.7, 0.6], start=1):
        windows.observe([Observation(participant="a", epoch=epoch, train_loss=0.0, metrics={}, score=score)])
    windows.last_merge_epoch = 3
    progress = windows.progress(["a", "b"])["a"]
    assert progress.trend == pytest.approx((0.6 - 0.4) / 2)
    assert progress.gain == pytest.approx((0.7 - 0.4) / 2)
    assert progress.first_gain == pytest.approx((0.5 - 0.1) / 2)
    assert progress.drop == pytest.approx(0.1)
    assert (progress.first, progress.best, progress.last) == (0.4, 0.7, 0.6)
    assert progress.num_since_merge == 2


@pytest.mark.parametrize("scores", [flat(14), straight(14)], ids=["flat", "straight"])
@pytest.mark.parametrize("cut", range(14))
def test_a_resumed_schedule_merges_at_the_same_epochs(scores: list[tuple[float, ...]], cut: int) -> None:
    whole, part, resumed = AdaptiveMergeScheduler(5), AdaptiveMergeScheduler(5), AdaptiveMergeScheduler(5)
    before = run(part, scores[:cut])
    resumed.load_state(json.loads(json.dumps(part.state())))
    assert before + run(resumed, scores[cut:], first=cut + 1) == run(whole, scores)
    assert resumed.state() == whole.state()


# --- properties

SCORES = st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.5, 0.50001, 0.9]))
EPOCHS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=25)
SCHEDULERS = st.tuples(
    st.integers(1, 6), st.integers(0, 6), st.integers(0, 9), st.integers(2, 5), st.booleans()
)


def build(numbers: tuple[int, int, int, int, bool]) -> AdaptiveMergeScheduler:
    low, above, more, window, trigger = numbers
    return AdaptiveMergeScheduler(
        low + above,
        min_merge_frequency=low,
        max_merge_frequency=low + above + more,
        window=window,
        performance_trigger=trigger,
    )


@settings(deadline=None, max_examples=200)
@given(
    numbers=SCHEDULERS,
    epochs=EPOCHS,
    gate=st.lists(st.booleans(), min_size=25, max_size=25),
    cut=st.integers(0, 25),
)
def test_bounded_repeatable_and_the_same_after_resumption(numbers, epochs, gate, cut) -> None:
    scheduler, last_merge = build(numbers), 0
    for epoch, scores in enumerate(epochs, start=1):
        if epoch - 1 == cut:  # killed and resumed
            resumed = build(numbers)
            resumed.load_state(json.loads(json.dumps(scheduler.state(), allow_nan=False)))
            assert resumed.state() == scheduler.state()
            before, scheduler = scheduler, resumed
            twin = before
        else:
            twin = None
        observe(scheduler, epoch, *scores)
        decision = scheduler.decide(epoch, LOCALES)
        assert decision == scheduler.decide(epoch, LOCALES)
        if twin is not None:
            observe(twin, epoch, *scores)
            assert twin.decide(epoch, LOCALES) == decision
        frequency = decision.recommended_frequency
        assert scheduler.min_merge_frequency <= frequency <= scheduler.max_merge_frequency
        assert 0 <= decision.confidence <= 1
        assert decision.reason
        assert decision.should_merge == (decision.trigger != "none")
        assert all(math.isfinite(value) for value in decision.metrics.values())
        if decision.should_merge:
            assert epoch - last_merge >= scheduler.min_merge_frequency
            scheduler.record_merge(epoch, {"en-US": gate[epoch - 1], "fr-FR": gate[epoch - 1]})
            last_merge = epoch
        else:
            assert epoch - last_merge < frequency
