import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.reporting import round_metrics
from toolkit.reporting.history import History
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.listeners import Listeners
from toolkit.reporting.records import AlertRecord, ComparisonRecord, MergeRecord, StepRecord
from toolkit.rounds.monitor import LOG_NAME, build_listeners
from toolkit.rounds.statistics_files import FILES, StatisticsFiles

NUM_EPOCHS = 6
JSON_NAMES = ("training_history.json", "training_metrics.json", *FILES)
TIMES = {"time", "sessions", "started", "num_sessions", "wall_seconds", "share_of_wall_time"}


@pytest.fixture
def names(fake_rounds):
    return fake_rounds.LOCALES[:4]


def play(run, run_dir, config, *, restored=None, first_epoch=1, stop=lambda record: False, ends=True) -> None:
    """The records of a run, or those up to the first one at which it is to stop."""
    listener, _ = build_listeners(run_dir, config, is_main_process=True, resumed_history=restored)
    with listener:
        listener.handle(run.start())
        for record in run.records(first_epoch=first_epoch):
            if stop(record):
                # What a kill leaves: nothing is closed, the last flush was a while ago.
                listener.flush()
                return
            listener.handle(record)
        if ends:
            listener.handle(run.end(Path("run")))


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def holes(value, where="") -> list[str]:
    """Places of a JSON value that hold nothing."""
    if value is None or value in ("", [], {}):
        return [where]
    if isinstance(value, dict):
        return [hole for key, item in value.items() for hole in holes(item, f"{where}/{key}")]
    return [hole for item in value for hole in holes(item, where)] if isinstance(value, list) else []


def test_the_files_of_the_guide_are_there_with_every_key_filled(fake_rounds, make_config, read_strict):
    config = make_config(report_to=["tensorboard"])
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], NUM_EPOCHS)
    play(run, config.output_dir, config)
    for name in (*JSON_NAMES, LOG_NAME, "training.log", "report.html"):
        assert (config.output_dir / name).is_file(), name
    # Nothing failed, nothing was said, no GPU, no training before the first evaluation: there these say "nothing".
    nothing = re.compile(
        r".*/(gpu|alerts|counts|error|reason|data_check|samples|resumed_from|notes|stopped|failed)"
        r"|/evaluations/train_loss|/participants/fr-FR/last_weights"
        r"|/participants/.*/merges/(mean_change|mean_change_rejected|last_epoch)"
    )
    for name in JSON_NAMES:
        empty = [hole for hole in holes(read_strict(config.output_dir / name)) if not nothing.fullmatch(hole)]
        assert empty == [], name


def test_merge_history(fake_rounds, make_config, read_strict, names):
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, config.output_dir, config)
    content = read_strict(config.output_dir / "merge_history.json")
    assert {
        key: content[key] for key in ("merged", "skipped", "failed", "attempts", "accepted", "rejected")
    } == {**{"merged": 3, "skipped": 0, "failed": 0, "attempts": 3, "accepted": 5, "rejected": 3}}
    assert content["triggers"] == {"frequency": 3}
    assert [merge["epoch"] for merge in content["merges"]] == [2, 4, 6]
    first, expected = content["merges"][0], dataclasses.asdict(run.merge(2))
    assert {key: first[key] for key in expected} == json.loads(json.dumps(expected))
    for weights in first["weights"].values():
        assert sum(weights.values()) == pytest.approx(1)


def test_state_summary(fake_rounds, make_config, read_strict, names):
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, config.output_dir, config)
    content = read_strict(config.output_dir / "state_summary.json")
    assert (content["status"], content["epoch"], content["num_epochs"]) == ("done", 6, 6)
    assert content["last_decision"]["reason"] == "every 2 epochs"
    parts = content["participants"]
    assert {name: part["status"] for name, part in parts.items()} == {
        **{"en-US": "done", "fr-FR": "stopped", "de-DE": "failed", "sq-AL": "done"}
    }
    assert parts["fr-FR"]["reason"].startswith("no better for 2 evaluations")
    assert parts["de-DE"]["reason"] == "the training loss is nan at step 50"
    assert parts["de-DE"]["step"] == 50
    assert parts["en-US"]["last_checkpoint"] == "en-US/checkpoints/step-00000120"
    assert parts["en-US"]["last_weights"] == run.merge(6).weights["en-US"]
    assert parts["sq-AL"]["merges"]["rejected"] == 3
    # The last merge gave en-US more than its own training, and nothing to sq-AL, which refused it.
    last = {name: parts[name]["evaluation"]["accuracy"]["last"] for name in ("en-US", "sq-AL")}
    assert last["en-US"] == run.merge(6).after["en-US"]["accuracy"]
    assert last["sq-AL"] == run.metrics("sq-AL", 6)["accuracy"]


def test_final_statistics(fake_rounds, make_config, read_strict, names):
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, config.output_dir, config)
    content = read_strict(config.output_dir / "final_statistics.json")
    assert content["comparison"] == run.comparison().comparison
    assert content["verdicts"] == run.comparison().verdicts
    assert content["paths"] == {"Model saved to": "run/final_model"}
    assert content["alerts"] == {"non_finite_loss": 1, "participant_failed": 1}
    assert content["merges"]["merged"] == content["num_rounds"] / 2 == 3
    assert content["total_steps"] == 120 + 80 + 50 + 120
    changes = content["participants"]["en-US"]["merges"]["mean_change"]
    assert changes["accuracy"] == pytest.approx(0.02)
    refused = content["participants"]["sq-AL"]["merges"]
    assert refused["mean_change"] == {}
    assert refused["mean_change_rejected"]["accuracy"] == pytest.approx(-0.03)


def test_training_metrics_hold_the_steps_and_the_merges(fake_rounds, make_config, read_strict):
    config = make_config()
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 30)
    play(run, config.output_dir, config)
    part = read_strict(config.output_dir / "training_metrics.json")["participants"]["en-US"]
    curve = part["curve"]
    steps = [run.step("en-US", step) for step in range(1, run.num_steps + 1)]
    assert len({len(column) for column in curve.values()}) == 1
    assert len(curve["step"]) <= round_metrics.MAX_CURVE_POINTS < run.num_steps
    assert curve["step"][-1] == run.num_steps
    assert curve["loss"] == [steps[int(step) - 1].loss for step in curve["step"]]
    assert part["trend"]["train_loss_change_of_last_epoch"] == pytest.approx(
        sum(r.loss for r in steps[-20:]) / 20 - sum(r.loss for r in steps[-40:-20]) / 20
    )
    # The evaluation at the end is followed by the merge that was accepted.
    assert part["evaluation"]["accuracy"]["best"] == run.merge(30).after["en-US"]["accuracy"]


def test_a_run_without_rounds_knows_nothing_of_them(fake_run, make_config, read_strict):
    from toolkit.reporting import listeners

    config = make_config()
    with listeners.build(config.output_dir, config, is_main_process=True) as listener:
        listener.handle(fake_run.start(["model"], 12))
        for record in fake_run.records(["model"], 12):
            listener.handle(record)
        listener.handle(fake_run.end(config.output_dir))
    texts = [(config.output_dir / name).read_text() for name in JSON_NAMES[:2]]
    for word in ("merges", "rounds", "alerts", "comparison", "curve", '"rows"'):
        assert not any(word in text for text in texts), word
    assert sorted(path.name for path in config.output_dir.iterdir()) == [
        *("report.html", "training.log", "training_history.json", "training_metrics.json")
    ]


@pytest.mark.parametrize(
    ("after", "epoch"), [("steps", 0), ("steps", 1), ("steps", 4), ("steps", 6), ("merge", 1), ("merge", 2)]
)
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    tmp_path, fake_rounds, make_config, read_strict, names, epoch, after
):
    """Whatever was written beyond the commit that is resumed from, nothing stands twice and nothing is lost."""
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, tmp_path / "whole", config)

    def is_beyond(record) -> bool:
        if after == "merge":
            # The kill comes after the next merge was recorded and before it was committed.
            return isinstance(record, MergeRecord) and record.epoch > epoch + 2
        return isinstance(record, StepRecord) and record.epoch > epoch + 0.6

    run_dir = tmp_path / "resumed"
    play(run, run_dir, config, stop=is_beyond, ends=False)
    restored = dict.fromkeys(names, epoch * fake_rounds.STEPS_PER_EPOCH)
    play(run, run_dir, config, restored=restored, first_epoch=epoch + 1)
    for name in JSON_NAMES:
        whole, resumed = (
            without_times(read_strict(folder / name)) for folder in (tmp_path / "whole", run_dir)
        )
        assert resumed == whole, name


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_there_before_the_run_is_over(fake_rounds, make_config, read_strict, names, name):
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    listener, _ = build_listeners(config.output_dir, config, is_main_process=True)
    with listener:
        listener.handle(run.start())
        for record in run.round(1):
            listener.handle(record)
        listener.flush()
        content = read_strict(config.output_dir / name)
        assert content["format"] == 1
        assert content.get("status", "running") == "running"
    assert read_strict(config.output_dir / name).get("status", "failed") == "failed"


@pytest.mark.faults
def test_a_killed_run_leaves_files_that_go_on(
    tmp_path, fake_rounds, fake_rounds_path, make_config, read_strict, names
):
    config = make_config()
    run_dir = tmp_path / "killed"
    code = f"""
import os, runpy, signal
from pathlib import Path
from toolkit.config.recipes import CentralizedConfig
from toolkit.reporting.records import CheckpointRecord, RoundRecord
from toolkit.rounds.monitor import build_listeners
fake = runpy.run_path({str(fake_rounds_path)!r})
run = fake["FakeRounds"]({names}, {NUM_EPOCHS})
out = Path({str(run_dir)!r})
config = CentralizedConfig(model="m", data="d", output_dir=out, report_to=[])
listener, _ = build_listeners(out, config, is_main_process=True)
listener.handle(run.start())
for record in run.records():
    listener.handle(record)
    if isinstance(record, CheckpointRecord):
        listener.flush()
    if isinstance(record, RoundRecord) and record.epoch == 4:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for name in JSON_NAMES:
        read_strict(run_dir / name)
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, run_dir, config, restored=dict.fromkeys(names, 80), first_epoch=5)
    play(run, tmp_path / "whole", config)
    for name in ("merge_history.json", "training_alerts.json"):
        assert without_times(read_strict(run_dir / name)) == without_times(
            read_strict(tmp_path / "whole" / name)
        )


def test_a_file_that_says_the_same_is_not_written_again(tmp_path, fake_rounds):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 2)
    writer = HistoryWriter(tmp_path)
    files = StatisticsFiles(tmp_path, writer.history)
    composite = Listeners(essential=[writer, files])
    for record in [run.start(), *run.records()]:
        composite.handle(record)
    composite.flush()
    alerts = (tmp_path / "training_alerts.json").stat().st_mtime_ns
    summary = (tmp_path / "state_summary.json").stat().st_mtime_ns
    composite.handle(dataclasses.replace(run.step("en-US", 40), step=41, loss=0.123))
    composite.flush()
    assert (tmp_path / "training_alerts.json").stat().st_mtime_ns == alerts
    assert (tmp_path / "state_summary.json").stat().st_mtime_ns > summary


def test_looking_at_a_finished_run_leaves_its_files_alone(fake_rounds, make_config, names):
    from toolkit.reporting.records import MessageRecord

    config = make_config()
    play(fake_rounds.FakeRounds(names, 2), config.output_dir, config)
    before = {name: (config.output_dir / name).read_bytes() for name in JSON_NAMES}
    listener, _ = build_listeners(config.output_dir, config, is_main_process=True)
    with listener:
        listener.handle(MessageRecord(level="info", text="nothing is left to do"))
    assert {name: (config.output_dir / name).read_bytes() for name in JSON_NAMES} == before


def test_other_ranks_write_nothing(fake_rounds, make_config):
    config = make_config()
    listener, _ = build_listeners(config.output_dir, config, is_main_process=False)
    with listener:
        for record in fake_rounds.FakeRounds(["en-US"], 1).records():
            listener.handle(record)
    assert not config.output_dir.exists()


def test_a_participant_that_is_set_back_makes_its_steps_again(tmp_path, fake_rounds, read_strict):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 2)
    writer = HistoryWriter(tmp_path)
    writer.handle(run.start())
    for record in run.round(1):
        writer.handle(record)
    for step in (21, 22, 23):
        writer.handle(run.step("en-US", step))
        writer.handle(run.step("fr-FR", step))
    for step in (15, 16):
        writer.handle(dataclasses.replace(run.step("en-US", step), loss=9.0))
    assert list(writer.history.series["en-US"]["step"]) == [*range(1, 15), 15, 16]
    assert list(writer.history.series["en-US"]["loss"][-2:]) == [9.0, 9.0]
    assert list(writer.history.series["fr-FR"]["step"]) == list(range(1, 24))
    assert [e["participant"] for e in writer.history.evaluations] == ["fr-FR"]
    writer.flush()
    rows = read_strict(tmp_path / "training_history.json")["steps"]
    assert [row["step"] for row in rows if row["participant"] == "en-US"] == list(range(1, 17))


def test_a_history_is_read_back_as_the_records_it_was_made_of(tmp_path, fake_rounds):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 2)
    alert = AlertRecord(
        kind="loss_explosion", participant=None, step=None, message="m", values={"loss": float("inf")}
    )
    writer = HistoryWriter(tmp_path)
    records = [run.start(), *run.records(), alert]
    for record in records:
        writer.handle(record)
    writer.flush()
    history = History.load(tmp_path / "training_history.json", {"en-US": 40, "fr-FR": 40})
    kept = [r for r in records if not isinstance(r, StepRecord | ComparisonRecord)]
    events = history.events()
    for kind in {type(event) for event in events}:
        assert [e for e in events if type(e) is kind] == [r for r in kept if type(r) is kind]
    assert history.comparison == writer.history.comparison


def test_a_run_that_is_resumed_after_its_last_round_has_all_of_it(
    tmp_path, fake_rounds, make_config, read_strict, names
):
    """Only the comparison was left: the run does not start any more, and no round comes."""
    config = make_config()
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    play(run, tmp_path / "whole", config)
    run_dir = tmp_path / "resumed"
    play(run, run_dir, config, stop=lambda record: isinstance(record, ComparisonRecord))
    listener, monitor = build_listeners(
        run_dir, config, is_main_process=True, resumed_history=dict.fromkeys(names, 120)
    )
    with listener:
        listener.handle(run.comparison())
        listener.handle(run.end(Path("run")))
    for name in JSON_NAMES:
        whole, resumed = (
            without_times(read_strict(folder / name)) for folder in (tmp_path / "whole", run_dir)
        )
        assert resumed == whole, name
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    for expected in ("linear, each locale its own mixture", "Did merging help?", "Participants side by side"):
        assert expected in page
    assert len(monitor.alerts) == 2


def test_what_lies_beyond_the_restored_steps_is_dropped(tmp_path, fake_rounds, names):
    run = fake_rounds.FakeRounds(names, NUM_EPOCHS)
    writer = HistoryWriter(tmp_path)
    for record in [run.start(), *run.records()]:
        writer.handle(record)
    writer.flush()
    restored = dict.fromkeys(names, 60) | {"de-DE": 50}
    history = History.load(tmp_path / "training_history.json", restored)
    assert [merge["epoch"] for merge in history.merges] == [2]
    assert [entry["epoch"] for entry in history.rounds] == [1, 2, 3]
    assert round_metrics.status_of(history, "de-DE")[0] == "failed"
    assert round_metrics.status_of(history, "fr-FR")[0] == "active"
    before = History.load(tmp_path / "training_history.json", dict.fromkeys(names, 19))
    assert (before.merges, before.rounds) == ([], [])


def test_the_story_has_everything_but_the_steps(fake_rounds, make_config, names):
    config = make_config()
    play(fake_rounds.FakeRounds(names, NUM_EPOCHS), config.output_dir, config)
    story, log = (
        (config.output_dir / name).read_text(encoding="utf-8") for name in (LOG_NAME, "training.log")
    )
    assert "step 12/120" in log
    assert not re.search(r"step \d+/120", story)
    for text in (story, log):
        for expected in (
            "run of iterative-merge starts: Synthetic rounds",
            "en-US: evaluation at step 40",
            "merge after epoch 2: linear of en-US, fr-FR, de-DE, sq-AL, 1.2 s (every 2 epochs)",
            "loss 0.7826 -> 0.8026, accuracy 0.7391 -> 0.7591, f1 0.7191 -> 0.7391  accepted",
            "epoch 4/6 done, 2 active, 1 stopped early, 1 failed, 0:12",
            "fr-FR stopped early: no better for 2 evaluations",
            "alert (non finite loss): de-DE, step 50: the training loss is nan",
            "no difference",
            "run done",
        ):
            assert text.count(expected) >= 1, expected
        assert text.count("fr-FR stopped early") == 1


def test_every_kind_of_record_reaches_the_log(fake_rounds, make_config, names):
    """A record that no listener knows would be taken for the end of the run."""
    config = make_config()
    run = fake_rounds.FakeRounds(names, 2)
    listener, _ = build_listeners(Path(config.output_dir), config, is_main_process=True)
    with listener:
        listener.handle(run.start())
        listener.handle(dataclasses.replace(run.merge(2), status="failed", attempts=3, error="keys differ"))
        listener.handle(
            dataclasses.replace(run.merge(2), round=3, status="skipped", error="one participant is left")
        )
    text = (config.output_dir / LOG_NAME).read_text(encoding="utf-8")
    assert (
        "WARNING toolkit.run: merge after epoch 2 (linear of en-US, fr-FR, de-DE, sq-AL) failed after 3 attempts: "
        in text
    )
    assert "no merge after epoch 2: one participant is left" in text
