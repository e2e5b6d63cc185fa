import dataclasses
import math
import random

import pytest

from toolkit.reporting.history import History
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.listeners import Collector, Listeners
from toolkit.reporting.records import (
    AlertRecord,
    EvaluationRecord,
    MergeRecord,
    RoundRecord,
    RunStart,
    StepRecord,
)
from toolkit.rounds.alert_rules import AlertThresholds
from toolkit.rounds.monitor import EnhancedMonitor

PLENTY = 10**12


@pytest.fixture
def monitor():
    return EnhancedMonitor(memory_limit_bytes=PLENTY)


@pytest.fixture
def step_of(fake_rounds):
    record = fake_rounds.FakeRounds(["m"], 1).step("m", 1)
    return lambda step, loss, name="m", **changes: dataclasses.replace(
        record, participant=name, step=step, loss=loss, **changes
    )


def train(monitor, step_of, losses, name="m", first=1) -> list[AlertRecord]:
    """The alerts that these losses raise."""
    before = len(monitor.alerts)
    for step, loss in enumerate(losses, first):
        monitor.handle(step_of(step, loss, name))
    return monitor.alerts[before:]


def evaluation(accuracy, step=10, **metrics) -> EvaluationRecord:
    metrics = {"accuracy": accuracy, **metrics}
    return EvaluationRecord(
        participant="m", step=step, epoch=1.0, phase="during", metrics=metrics, seconds=1.0
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_lost_training_loss_is_said_once_and_again_after_a_recovery(monitor, step_of, loss):
    alerts = train(monitor, step_of, [1.0, 1.0, loss, loss, loss, 1.0, loss])
    assert [(a.kind, a.participant, a.step) for a in alerts] == [
        ("non_finite_loss", "m", 3),
        ("non_finite_loss", "m", 7),
    ]
    assert alerts[0].message == f"m, step 3: the training loss is {loss}"


def test_a_lost_held_out_loss_is_an_alert_of_its_own(monitor, step_of):
    train(monitor, step_of, [math.nan])
    monitor.handle(evaluation(0.5, eval_loss=math.nan))
    monitor.handle(evaluation(0.5, eval_loss=math.nan, step=20))
    assert [a.kind for a in monitor.alerts] == ["non_finite_loss"] * 2


def test_a_loss_that_explodes_is_said_once(monitor, step_of):
    usual = [2.0, 2.1, 1.9, 2.0, 2.0, *[1.0] * 40]
    # Five losses of 4.1 have a mean over twice the first ones' median, 2.0; four of them do not.
    alerts = train(monitor, step_of, [*usual, *[4.1] * 20])
    assert [(a.kind, a.step) for a in alerts] == [("loss_explosion", 50)]
    assert alerts[0].values == {"train_loss": pytest.approx(4.1), "usual": 2.0, "threshold": 4.0}


def test_just_below_twice_the_usual_loss_is_no_explosion(monitor, step_of):
    assert train(monitor, step_of, [*[2.0] * 40, *[3.99] * 20]) == []


def test_hard_batches_when_losses_are_small_are_no_explosion(monitor, step_of):
    noise = random.Random(7)
    losses = [4.0 * math.exp(-step / 40) + noise.random() * 0.3 for step in range(400)]
    losses[300] = 6.0
    assert train(monitor, step_of, losses) == []


def test_a_single_loss_beyond_all_measure_is_an_explosion(monitor, step_of):
    assert [a.step for a in train(monitor, step_of, [*[2.0] * 30, 1e6, *[2.0] * 30])] == [31]


def test_a_loss_that_rises_slowly_is_no_explosion(monitor, step_of):
    # To reach twice the median of the 50 before it would have to grow by over 2.5 % a step.
    assert train(monitor, step_of, [0.5] * 20 + [0.5 * 1.01**step for step in range(200)]) == []
    assert train(monitor, step_of, [0.5] * 20 + [0.5 * 1.05**step for step in range(200)], "other") != []


def test_each_participant_has_its_own_losses(monitor, step_of):
    train(monitor, step_of, [1.0] * 30, "a")
    assert train(monitor, step_of, [50.0] * 30, "b") == []
    assert [a.participant for a in train(monitor, step_of, [50.0] * 5, "a", first=31)] == ["a"]
    assert [a.participant for a in train(monitor, step_of, [500.0] * 5, "b", first=31)] == ["b"]


def test_thresholds_are_looked_at(step_of):
    careless = EnhancedMonitor(AlertThresholds(explosion_factor=100.0), memory_limit_bytes=PLENTY)
    assert train(careless, step_of, [*[1.0] * 20, *[50.0] * 10]) == []
    nervous = EnhancedMonitor(
        AlertThresholds(smoothing_steps=1, explosion_factor=1.1), memory_limit_bytes=PLENTY
    )
    assert [a.step for a in train(nervous, step_of, [1.0, 1.0, 1.2])] == [3]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.8, 0.39], 1),
        ([0.8, 0.41], 0),  # not below half of the best
        ([0.1, 0.02], 0),  # not 0.1 below the best
        ([0.8, 0.3, 0.2], 1),
        ([0.8, 0.5, 0.3], 1),  # half of the best, not of the one before
        ([0.8, 0.3, 0.7, 0.3], 2),
        ([0.0, 0.0], 0),
    ],
)
def test_accuracy_that_collapses(monitor, accuracies, expected):
    for step, accuracy in enumerate(accuracies):
        monitor.handle(evaluation(accuracy, step=step))
    assert [a.kind for a in monitor.alerts] == ["accuracy_collapse"] * expected


def test_f1_is_looked_at_where_there_is_no_accuracy(monitor):
    for step, f1 in enumerate((0.9, 0.2)):
        record = evaluation(0.0, step=step)
        monitor.handle(dataclasses.replace(record, metrics={"f1": f1}))
    assert [a.kind for a in monitor.alerts] == ["accuracy_collapse"]


def merge(fake_rounds, **changes) -> MergeRecord:
    record = fake_rounds.FakeRounds(["m", "other"], 4).merge(2)
    return dataclasses.replace(record, **changes)


@pytest.mark.parametrize(("verdict", "expected"), [("accepted", 1), (None, 1), ("rejected", 0)])
def test_a_merge_that_ruins_a_participant_is_an_alert_if_it_took_it(monitor, fake_rounds, verdict, expected):
    monitor.handle(evaluation(0.9))
    monitor.handle(merge(fake_rounds, gate={"m": verdict}, after={"m": {"accuracy": 0.2}}))
    assert [a.kind for a in monitor.alerts] == ["accuracy_collapse"] * expected
    assert all("after the merge" in a.message for a in monitor.alerts)
    numbers = monitor.participants["m"]
    assert numbers.metrics["accuracy"] == (0.2 if expected else 0.9)
    assert (numbers.num_accepted, numbers.num_rejected) == ((1, 0) if expected else (0, 1))


def test_a_merge_that_fails_is_an_alert(monitor, fake_rounds):
    monitor.handle(merge(fake_rounds, status="failed", attempts=3, error="no such tensor"))
    assert monitor.alerts[0].kind == "merge_failed"
    assert monitor.alerts[0].message == "the merge after epoch 2 was tried 3 times and failed: no such tensor"


def test_memory_is_said_once_for_the_run(step_of):
    monitor = EnhancedMonitor(memory_limit_bytes=1000)
    for step, used in enumerate((899, 900, 901, 950), 1):
        monitor.handle(step_of(step, 1.0, memory_bytes=used))
    monitor.handle(step_of(1, 1.0, "other", memory_bytes=999))
    assert [(a.kind, a.participant, a.step) for a in monitor.alerts] == [("memory", "m", 3)]


def test_the_memory_that_there_is_is_asked_of_the_system(step_of):
    monitor = EnhancedMonitor()
    monitor.handle(step_of(1, 1.0, memory_bytes=10**6))
    assert monitor.alerts == []
    monitor.handle(step_of(2, 1.0, memory_bytes=10**17))
    assert [a.kind for a in monitor.alerts] == ["memory"]
    assert 10**8 < monitor.alerts[0].values["limit_bytes"] < 10**16


@pytest.mark.parametrize("is_said_by_the_run", [True, False])
def test_a_participant_that_fails_is_said_once(monitor, fake_rounds, is_said_by_the_run):
    run = fake_rounds.FakeRounds(fake_rounds.LOCALES[:4], 6)
    monitor.handle(run.start())
    if is_said_by_the_run:
        monitor.handle(
            AlertRecord(kind="participant_failed", participant="de-DE", step=50, message="de-DE failed")
        )
    for epoch in (2, 3, 4, 5):
        for record in run.round(epoch):
            if isinstance(record, RoundRecord):
                monitor.handle(record)
    assert [(a.kind, a.participant) for a in monitor.alerts] == [("participant_failed", "de-DE")]
    assert {name: numbers.status for name, numbers in monitor.participants.items()} == {
        "en-US": "active",
        "fr-FR": "stopped",
        "de-DE": "failed",
        "sq-AL": "active",
    }


def test_an_alert_reaches_every_listener_after_the_record_that_raised_it(monitor, step_of):
    before, after = Collector(), Collector()
    composite = Listeners(essential=[before, monitor, after])
    monitor.emit = composite.handle
    composite.handle(step_of(1, math.nan))
    composite.handle(step_of(2, 1.0))
    kinds = [StepRecord, AlertRecord, StepRecord]
    assert [type(r) for r in before.records] == [type(r) for r in after.records] == kinds
    assert len(monitor.alerts) == 1


def test_a_listener_that_fails_while_it_speaks_leaves_nothing_behind(step_of):
    class Failing(Collector):
        def handle(self, record):
            composite.handle(record)
            raise OSError("disk full")

    composite = Listeners(essential=[Failing()])
    with pytest.raises(OSError, match="disk full"):
        composite.handle(step_of(1, 1.0))
    collector = Collector()
    composite._essential[:] = [collector]
    composite.handle(step_of(2, 1.0))
    assert [record.step for record in collector.records] == [2]


def test_numbers_of_a_participant(monitor, fake_rounds):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 4)
    for record in [run.start(), *run.records()]:
        monitor.handle(record)
    numbers = monitor.participants["en-US"]
    assert (numbers.step, numbers.epoch) == (80, 4.0)
    assert numbers.train_loss == run.step("en-US", 80).loss
    assert (numbers.num_accepted, numbers.num_rejected) == (2, 0)
    assert monitor.participants["fr-FR"].num_rejected == 2
    # The merge of the last epoch is better than what training alone reached.
    assert numbers.best["accuracy"] == run.merge(4).after["en-US"]["accuracy"]
    assert monitor.summary()["participants"]["en-US"]["step"] == 80


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4, 5])
def test_a_resumed_monitor_says_what_the_uninterrupted_one_says(tmp_path, fake_rounds, epoch):
    """Alerts, numbers and what was wrong are taken up from the history."""
    run = fake_rounds.FakeRounds(fake_rounds.LOCALES[:4], 6)

    def bad(record):
        # Explodes in the middle of epoch 2 and stays so; fr-FR's accuracy collapses at the end of epoch 3.
        if isinstance(record, StepRecord) and record.participant == "sq-AL" and record.step > 30:
            return dataclasses.replace(record, loss=100.0)
        if isinstance(record, EvaluationRecord) and record.participant == "fr-FR" and record.epoch >= 3:
            return dataclasses.replace(record, metrics={"accuracy": 0.01})
        return record

    whole = EnhancedMonitor(memory_limit_bytes=PLENTY)
    for record in [run.start(), *map(bad, run.records())]:
        whole.handle(record)
    assert {a.kind for a in whole.alerts} == {
        *("loss_explosion", "accuracy_collapse", "non_finite_loss", "participant_failed")
    }

    first = EnhancedMonitor(memory_limit_bytes=PLENTY)
    writer = HistoryWriter(tmp_path)
    composite = Listeners(essential=[writer, first])
    first.emit = composite.handle
    composite.handle(run.start())
    for record in map(bad, run.records()):
        if isinstance(record, StepRecord) and record.epoch > epoch + 0.5:
            break
        composite.handle(record)
    writer.flush()
    restored = dict.fromkeys(run.names, epoch * fake_rounds.STEPS_PER_EPOCH)
    history = History.load(tmp_path / "training_history.json", restored)
    second = EnhancedMonitor(memory_limit_bytes=PLENTY).restore(history)
    second.handle(run.start())
    for record in map(bad, run.records(first_epoch=epoch + 1)):
        second.handle(record)
    assert sorted(map(repr, second.alerts)) == sorted(map(repr, whole.alerts))
    assert repr(second.participants) == repr(whole.participants)


def test_a_monitor_before_any_step_has_nothing_to_say(monitor):
    monitor.handle(RunStart(recipe="r", title="t", rows=[], num_steps=1, participants=["a", "b"]))
    monitor.flush()
    monitor.close()
    assert monitor.summary()["alerts"] == []
    assert list(monitor.participants) == ["a", "b"]
