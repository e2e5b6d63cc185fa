"""Merging every k epochs, and the trigger in between."""

import json

import pytest

from toolkit.config.recipes import IterativeConfig
from toolkit.errors import InputError
from toolkit.rounds.schedule import (
    AdaptiveMergeScheduler,
    FixedFrequency,
    MergeDecision,
    Observation,
    Schedule,
    build_schedule,
    schedule,
    schedules,
)
from toolkit.rounds.schedule import registry as registry_module

LOCALES = ["en-US", "fr-FR", "sq-AL"]


def observe(of: Schedule, epoch: int, *scores: float | None) -> None:
    of.observe(
        [
            Observation(participant=name, epoch=epoch, train_loss=1.0, metrics={}, score=score)
            for name, score in zip(LOCALES, scores, strict=False)
        ]
    )


def config(**options) -> IterativeConfig:
    return IterativeConfig(locales=LOCALES, **options)


@pytest.mark.parametrize("frequency", [1, 2, 3, 7])
def test_every_k_epochs(frequency: int) -> None:
    every = FixedFrequency(frequency)
    merged = []
    for epoch in range(1, 15):
        decision = every.decide(epoch, LOCALES)
        assert decision == every.decide(epoch, LOCALES)
        assert decision.recommended_frequency == frequency
        assert decision.confidence == 1.0
        assert decision.trigger == ("frequency" if decision.should_merge else "none")
        if decision.should_merge:
            merged.append(epoch)
            every.record_merge(epoch, dict.fromkeys(LOCALES, True))
    assert merged == list(range(frequency, 15, frequency))


def test_the_frequency_comes_from_the_option() -> None:
    every = build_schedule(config(merge_frequency=4))
    assert [epoch for epoch in range(1, 9) if every.decide(epoch, LOCALES).should_merge] == [4, 8]
    assert [e for e in range(1, 9) if build_schedule(config()).decide(e, LOCALES).should_merge] == [3, 6]


def test_nobody_there() -> None:
    decision = FixedFrequency(1).decide(1, [])
    assert not decision.should_merge
    assert "no participant" in decision.reason


def test_less_than_every_epoch() -> None:
    with pytest.raises(ValueError, match="every 0 epochs"):
        FixedFrequency(0)


# --- the trigger


def with_trigger(**options) -> Schedule:
    options = {"merge_frequency": 100, "performance_merge_trigger": True} | options
    return build_schedule(config(**options))


def feed(of: Schedule, *epochs: tuple[float, ...]) -> MergeDecision:
    for epoch, scores in enumerate(epochs, start=1):
        observe(of, epoch, *scores)
    return of.decide(len(epochs), LOCALES)


RISING = [(0.5, 0.5, 0.5), (0.6, 0.6, 0.6), (0.7, 0.7, 0.7)]


def test_all_is_well() -> None:
    decision = feed(with_trigger(), *RISING)
    assert not decision.should_merge
    assert decision.metrics["num_with_full_window"] == 3
    assert decision.metrics["num_troubled"] == 0


def test_a_participant_that_falls() -> None:
    epochs = [*RISING[:2], (0.7, 0.7, 0.55)]
    decision = feed(with_trigger(), *epochs)
    assert decision.should_merge
    assert decision.trigger == "performance"
    assert decision.reason == "sq-AL fell from 0.6 to 0.55"
    assert decision.confidence == pytest.approx(1 / 3)
    # Without the option nothing happens.
    assert not feed(with_trigger(performance_merge_trigger=False), *epochs).should_merge


def test_a_fall_within_two_percent_is_none() -> None:
    # The mean of the last scores is 0.7: falls count from 0.014.
    assert not feed(with_trigger(), (0.5, 0.5, 0.6), (0.6, 0.6, 0.71), (0.7, 0.7, 0.70)).should_merge
    assert feed(with_trigger(), (0.5, 0.5, 0.6), (0.6, 0.6, 0.72), (0.7, 0.7, 0.70)).should_merge


def test_a_participant_that_falls_behind() -> None:
    decision = feed(with_trigger(), (0.5, 0.5, 0.50), (0.6, 0.6, 0.51), (0.7, 0.7, 0.52))
    assert decision.trigger == "performance"
    assert "sq-AL fell behind the others" in decision.reason
    # One that was behind all along, and learns as fast as they do, is not falling behind.
    assert not feed(with_trigger(), (0.5, 0.5, 0.1), (0.6, 0.6, 0.2), (0.7, 0.7, 0.3)).should_merge
    # Nor is one that was ahead and is caught up with.
    assert not feed(with_trigger(), (0.5, 0.5, 0.90), (0.6, 0.6, 0.91), (0.7, 0.7, 0.92)).should_merge


def test_a_participant_that_stands_still() -> None:
    still = [(0.90, 0.90, 0.90), (0.91, 0.91, 0.90), (0.92, 0.92, 0.90005)]
    decision = feed(with_trigger(), *still)
    assert decision.trigger == "performance"
    assert decision.reason == "sq-AL stands still at 0.9001 since 3 evaluations"
    # Gains of 0.000025 per evaluation count where the threshold is lower.
    assert not feed(with_trigger(convergence_threshold=1e-5), *still).should_merge
    # The window is an option too.
    assert not feed(with_trigger(adaptive_window=4), *still).should_merge


def test_what_was_before_a_merge_does_not_trigger_again() -> None:
    of = with_trigger()
    assert feed(of, *RISING[:2], (0.7, 0.7, 0.55)).should_merge
    of.record_merge(3, dict.fromkeys(LOCALES, True))
    assert not of.decide(3, LOCALES).should_merge
    observe(of, 4, 0.71, 0.71, 0.70)
    assert not of.decide(4, LOCALES).should_merge


def test_standing_still_is_judged_on_evaluations_since_the_last_merge() -> None:
    of = with_trigger()
    feed(of, (0.90, 0.90, 0.90), (0.91, 0.91, 0.90), (0.92, 0.92, 0.90))
    assert "stands still" in of.decide(3, LOCALES).reason
    of.record_merge(3, dict.fromkeys(LOCALES, True))
    for epoch in (4, 5):
        observe(of, epoch, 0.92 + 0.001 * epoch, 0.92 + 0.001 * epoch, 0.90)
        assert not of.decide(epoch, LOCALES).should_merge
    observe(of, 6, 0.926, 0.926, 0.90)
    assert "stands still" in of.decide(6, LOCALES).reason


def test_scheduled_epochs_stay_where_they_are() -> None:
    of = with_trigger(merge_frequency=4)
    assert feed(of, *RISING[:2], (0.7, 0.7, 0.55)).should_merge
    of.record_merge(3, dict.fromkeys(LOCALES, True))
    observe(of, 4, 0.8, 0.8, 0.8)
    assert of.decide(4, LOCALES).trigger == "frequency"


def test_epochs_without_evaluation_say_nothing() -> None:
    of = with_trigger()
    for epoch, score in enumerate([0.5, None, 0.6, None, float("nan")], start=1):
        observe(of, epoch, score, score, score)
    assert of.decide(5, LOCALES).metrics["num_with_full_window"] == 0
    observe(of, 6, 0.7, 0.7, 0.7)
    decision = of.decide(6, LOCALES)
    assert not decision.should_merge
    assert decision.metrics["num_with_full_window"] == 3


def test_one_that_has_stopped_is_no_trouble() -> None:
    of = with_trigger()
    feed(of, *RISING[:2], (0.7, 0.7, 0.55))
    assert of.decide(3, LOCALES).should_merge
    observe(of, 4, 0.8, 0.8)
    assert not of.decide(4, LOCALES).should_merge


def test_loss_as_a_score() -> None:
    # Higher is better: the negative loss. Falls count from 2 % of its mean, 3.
    assert not feed(with_trigger(), (-4, -4, -4), (-3.5, -3.5, -3.0), (-3, -3, -3.05)).should_merge
    assert feed(with_trigger(), (-4, -4, -4), (-3.5, -3.5, -3.0), (-3, -3, -3.10)).should_merge


# --- the registry


def test_options_choose_the_schedule() -> None:
    assert isinstance(build_schedule(config()), FixedFrequency)
    assert isinstance(build_schedule(config(adaptive_merge_frequency=True)), AdaptiveMergeScheduler)
    assert set(schedules()) >= {"fixed", "adaptive"}


def test_a_schedule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_SCHEDULES", schedules())
    schedule("test_thirteen")(lambda config: FixedFrequency(13))
    assert build_schedule(config(schedule="test_thirteen")).decide(13, LOCALES).should_merge
    with pytest.raises(ValueError, match="registered twice"):
        schedule("test_thirteen")(lambda config: FixedFrequency(1))


def test_a_schedule_that_nobody_registered() -> None:
    with pytest.raises(InputError, match="unknown schedule 'fixd'; did you mean 'fixed'"):
        build_schedule(config().model_copy(update={"schedule": "fixd"}))


def test_the_state_is_json_and_decides_the_same() -> None:
    of, again = with_trigger(), with_trigger()
    feed(of, *RISING[:2], (0.7, 0.7, 0.55))
    again.load_state(json.loads(json.dumps(of.state())))
    assert again.decide(3, LOCALES) == of.decide(3, LOCALES)
    assert again.decide(3, LOCALES).trigger == "performance"
