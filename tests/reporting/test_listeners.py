import dataclasses
import json
import logging
import math
import re
import subprocess
import sys
import warnings

import pytest

from toolkit.dependencies import is_installed
from toolkit.errors import MissingDependencyError
from toolkit.reporting import listeners, trackers
from toolkit.reporting.log_file import LogFile
from toolkit.reporting.records import EvaluationRecord, MessageRecord, Record, StepRecord

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def handle_all(listener, fake_run, names, num_steps, run_dir, **options) -> None:
    listener.handle(fake_run.start(names, num_steps))
    for record in fake_run.records(names, num_steps, **options):
        listener.handle(record)
    listener.handle(fake_run.end(run_dir))


def test_a_run_writes_all_its_files(fake_run, make_config, tmp_path, capsys):
    config = make_config(report_to=["tensorboard"])
    with listeners.build(config.output_dir, config, is_main_process=True) as listener:
        handle_all(listener, fake_run, ["en-US", "fr-FR"], 12, config.output_dir)
    names = {path.relative_to(config.output_dir).as_posix() for path in config.output_dir.rglob("*")}
    names = {re.sub(r"events.out.*", "events", name) for name in names}
    assert names == {
        *("en-US", "en-US/logs", "en-US/logs/events", "fr-FR", "fr-FR/logs", "fr-FR/logs/events"),
        *("training.log", "training_history.json", "training_metrics.json", "report.html"),
    }
    shown = capsys.readouterr().out
    assert re.search(
        r"en-US {2}epoch 1/3 {2}train_loss: \d\.\d+, eval_loss: \d\.\d+, eval_accuracy: 0", shown
    )


def test_other_ranks_write_and_show_nothing(fake_run, make_config, capsys):
    config = make_config(report_to=["tensorboard"])
    with listeners.build(config.output_dir, config, is_main_process=False) as listener:
        handle_all(listener, fake_run, ["m"], 5, config.output_dir)
    assert not config.output_dir.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("script", "size"), [("fake_run_path", "--steps"), ("fake_rounds_path", "--epochs")])
def test_reporting_imports_no_torch(request, tmp_path, script, size):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', {str(tmp_path / 'run')!r}, {size!r}, '3']\n"
        f"runpy.run_path({str(request.getfixturevalue(script))!r}, run_name='__main__')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tensorflow', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_looking_at_a_finished_run_leaves_its_files_alone(fake_run, make_config):
    config = make_config(log_level="ERROR")
    with listeners.build(config.output_dir, config, is_main_process=True) as listener:
        handle_all(listener, fake_run, ["m"], 6, config.output_dir)
    names = ("training_history.json", "training_metrics.json", "report.html")
    before = [(config.output_dir / name).read_bytes() for name in names]
    with listeners.build(config.output_dir, config, is_main_process=True) as listener:
        listener.handle(MessageRecord(level="info", text="nothing is left to do"))
        listener.flush()
    assert [(config.output_dir / name).read_bytes() for name in names] == before


class Failing:
    def __init__(self) -> None:
        self.num_calls = 0

    def handle(self, record: Record) -> None:
        self.num_calls += 1
        raise ConnectionError("no route to the tracker")

    def flush(self) -> None:
        raise OSError("No space left on device")

    def close(self) -> None:
        raise AssertionError("a listener that was left out is not closed again")


def test_a_failing_tracker_is_warned_about_once_and_the_run_goes_on(fake_run, caplog):
    failing, collector = Failing(), listeners.Collector()
    composite = listeners.Listeners(essential=[collector], optional=[failing])
    handle_all(composite, fake_run, ["m"], 5, fake_run.Path("out"))
    composite.close()
    composite.close()
    assert failing.num_calls == 1
    assert len(collector.of(StepRecord)) == 5
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == [
        "Failing stopped working and is left out from here on: ConnectionError: no route to the tracker"
    ]


def test_a_history_that_cannot_be_written_ends_the_run(fake_run):
    composite = listeners.Listeners(essential=[Failing()])
    with pytest.raises(ConnectionError):
        composite.handle(fake_run.step_record("m", 1, 1, 0.0))
    with pytest.raises(OSError, match="No space"):
        composite.flush()


def test_the_log_is_appended_to_and_in_utc_and_has_the_warnings(fake_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    path = tmp_path / "training.log"
    for session in (1, 2):
        log = LogFile(path, level="INFO")
        log.handle(fake_run.start(["m"], 3))
        log.handle(fake_run.step_record("m", session, 3, 0.1))
        log.handle(MessageRecord(level="debug", text="not at this level"))
        logging.getLogger("toolkit.data").info("from a module")
        logging.getLogger("transformers.trainer").warning("from a library")
        logging.getLogger("transformers.trainer").info("chatter of a library")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("from Python", UserWarning, stacklevel=1)
        log.close()
    logging.getLogger("toolkit.data").warning("after the end")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(re.match(rf"{TIME} [A-Z]+ [\w.]+: |    ", line) for line in lines), text
    assert text.count("starts: Synthetic run") == 2
    assert sum("step 1/3 " in line for line in lines) == 1
    assert sum("step 2/3 " in line for line in lines) == 1
    for expected in ("from a module", "from a library", "UserWarning: from Python"):
        assert text.count(expected) == 2
    for unexpected in ("not at this level", "after the end", "chatter"):
        assert unexpected not in text


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_in_the_log_whatever_the_logging_steps(fake_run, tmp_path, loss):
    log = LogFile(tmp_path / "training.log", level="INFO", logging_steps=100)
    for step in (2, 3):
        record = fake_run.step_record("m", step, 10, 0.1)
        log.handle(record if step == 2 else dataclasses.replace(record, loss=loss))
    log.close()
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert len(lines) == 1
    assert "step 3/10" in lines[0]


def test_closing_the_log_leaves_the_loggers_as_they_were(tmp_path):
    before = [
        (logging.getLogger(n).handlers[:], logging.getLogger(n).level)
        for n in ("toolkit", "trl", "py.warnings")
    ]
    log = LogFile(tmp_path / "training.log", level="DEBUG")
    assert logging.getLogger("toolkit").level == logging.DEBUG
    log.close()
    after = [
        (logging.getLogger(n).handlers[:], logging.getLogger(n).level)
        for n in ("toolkit", "trl", "py.warnings")
    ]
    assert after == before


def read_events(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_a_resume(fake_run, make_config):
    config = make_config(report_to=["tensorboard"])
    run_dir = config.output_dir
    for first_step, last_step, restored in ((1, 17, None), (11, 30, {"m": 10})):
        tracker = trackers.build_trackers(run_dir, config, restored_steps=restored)[0]
        for record in fake_run.records(["m"], 30, first_step=first_step):
            if isinstance(record, StepRecord | EvaluationRecord) and record.step <= last_step:
                tracker.handle(record)
        tracker.close()
    shown = read_events(run_dir / "m" / "logs")
    expected = [fake_run.step_record("m", step, 30, 0.0) for step in range(1, 31)]
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 31))
    assert [value for _, value in shown["train/loss"]] == pytest.approx([r.loss for r in expected], rel=1e-6)
    assert [value for _, value in shown["train/learning_rate"]] == pytest.approx(
        [r.learning_rate for r in expected]
    )
    assert [step for step, _ in shown["eval/loss"]] == [0, 10, 20, 30, 30]
    tags = {
        "train/grad_norm",
        "speed/tokens_per_second",
        "memory/peak_bytes",
        "gpu/power_watts",
        "eval/accuracy",
    }
    assert tags <= set(shown)


def test_tensorboard_shows_merges_where_they_were_made(fake_rounds, make_config):
    config = make_config(report_to=["tensorboard"])
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 4)
    tracker = trackers.build_trackers(config.output_dir, config)[0]
    for record in run.records():
        tracker.handle(record)
    tracker.handle(dataclasses.replace(run.merge(4), round=5, status="failed"))
    tracker.close()
    for name, is_accepted in (("en-US", 1.0), ("fr-FR", 0.0)):
        shown = read_events(config.output_dir / name / "logs")
        assert shown["merge/is_accepted"] == [(40, is_accepted), (80, is_accepted)]
        merges = [run.merge(2), run.merge(4)]
        for when in ("before", "after"):
            values = [getattr(merge, when)[name]["accuracy"] for merge in merges]
            assert [value for _, value in shown[f"merge/accuracy_{when}"]] == pytest.approx(values)
        weights = [merge.weights[name]["fr-FR"] for merge in merges]
        assert [value for _, value in shown["merge_weight/fr-FR"]] == pytest.approx(weights)
        assert [step for step, _ in shown["train/loss"]] == list(range(1, 81))


def test_tensorboard_shows_each_step_once_when_a_participant_is_set_back(fake_rounds, make_config):
    config = make_config(report_to=["tensorboard"])
    run = fake_rounds.FakeRounds(["en-US"], 2)
    tracker = trackers.build_trackers(config.output_dir, config)[0]
    for step in (*range(1, 18), *range(11, 31)):
        tracker.handle(run.step("en-US", step))
    tracker.close()
    assert [step for step, _ in read_events(config.output_dir / "en-US" / "logs")["train/loss"]] == list(
        range(1, 31)
    )


@pytest.mark.parametrize("module_name", ["wandb", "trackio"])
def test_merges_reach_a_tracker_with_finite_numbers_and_their_step(fake_rounds, tmp_path, module_name):
    class Run:
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []

        def log(self, values: dict[str, float]) -> None:
            self.logged.append(values)

    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 2)
    merge = run.merge(2)
    after = {"en-US": {"loss": math.nan, "accuracy": 0.5, "num_tokens": 7}, "fr-FR": {"accuracy": 0.25}}
    tracker = trackers.RunTracker(module_name, "project", "name", {}, tmp_path, None)
    tracker._run, tracker._is_alone = Run(), False
    tracker.handle(dataclasses.replace(merge, after=after, weights={"all": {"en-US": 0.75, "fr-FR": 0.25}}))
    first, second = tracker._run.logged
    assert first["en-US/merge/accuracy_after"] == 0.5
    assert first["en-US/merge_weight/fr-FR"] == second["fr-FR/merge_weight/fr-FR"] == 0.25
    assert first["en-US/train/step"] == second["fr-FR/train/step"] == 40
    assert not any("loss_after" in tag or "num_tokens" in tag for tag in first)
    assert second["fr-FR/merge/is_accepted"] == 0.0


def test_a_lost_loss_reaches_tensorboard(fake_run, make_config):

    config = make_config(report_to=["tensorboard"])
    tracker = trackers.build_trackers(config.output_dir, config)[0]
    tracker.handle(dataclasses.replace(fake_run.step_record("m", 1, 1, 0.0), loss=math.nan))
    tracker.close()
    assert math.isnan(read_events(config.output_dir / "m" / "logs")["train/loss"][0][1])


@pytest.mark.skipif(is_installed("wandb"), reason="W&B is installed here")
def test_a_tracker_that_is_not_installed_is_known_before_training(make_config):
    config = make_config(report_to=["tensorboard", "wandb"])
    errors = trackers.missing_trackers(config)
    assert [str(error) for error in errors] == [
        "--report-to wandb needs the package wandb, which is not installed\n"
        '  hint: pip install "meldkit[report]"'
    ]
    with pytest.raises(MissingDependencyError):
        listeners.build(config.output_dir, config, is_main_process=True)
    assert not config.output_dir.exists()


def test_the_history_is_complete_at_a_flush(fake_run, make_config):
    config = make_config()
    listener = listeners.build(config.output_dir, config, is_main_process=True)
    for step in range(1, 51):
        listener.handle(fake_run.step_record("m", step, 100, 0.0))
    listener.flush()
    content = json.loads((config.output_dir / "training_history.json").read_text(encoding="utf-8"))
    assert len(content["steps"]) == 50
    listener.close()
