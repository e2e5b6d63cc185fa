import dataclasses
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.errors import RunDirectoryError
from toolkit.reporting.history import HISTORY_NAME, METRICS_NAME, as_float
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.metrics import quantile
from toolkit.reporting.records import EvaluationRecord, StepRecord

NAMES = ["en-US", "fr-FR"]
NUM_STEPS = 60


def write_whole_run(run_dir: Path, fake_run, **options) -> None:
    run_dir.mkdir()
    writer = HistoryWriter(run_dir, **options)
    writer.handle(fake_run.start(NAMES, NUM_STEPS))
    for record in fake_run.records(NAMES, NUM_STEPS):
        writer.handle(record)
    writer.handle(fake_run.end(run_dir))
    writer.close()


def without_times(content: dict) -> dict:
    return {
        k: v for k, v in content.items() if k not in ("sessions", "started", "num_sessions", "wall_seconds")
    }


def resume(run_dir: Path, fake_run, restored: int, **options) -> None:
    writer = HistoryWriter(run_dir, restored_steps=dict.fromkeys(NAMES, restored), **options)
    writer.handle(fake_run.start(NAMES, NUM_STEPS))
    for record in fake_run.records(NAMES, NUM_STEPS, first_step=restored + 1):
        writer.handle(record)
    writer.handle(fake_run.end(run_dir))
    writer.close()


@pytest.mark.parametrize("logging_steps", [1, 7])
@pytest.mark.parametrize("restored", [0, 20, 33])
def test_interrupted_and_resumed_is_the_uninterrupted_history(
    tmp_path, fake_run, read_strict, logging_steps, restored
):
    write_whole_run(tmp_path / "whole", fake_run, logging_steps=logging_steps)
    run_dir = tmp_path / "resumed"
    run_dir.mkdir()
    writer = HistoryWriter(run_dir, logging_steps=logging_steps)
    writer.handle(fake_run.start(NAMES, NUM_STEPS))
    for record in fake_run.records(NAMES, NUM_STEPS):
        if isinstance(record, StepRecord) and record.step > 45:
            break
        writer.handle(record)
    # Beyond the restored step, as after a kill between two checkpoints.
    writer.flush()
    resume(run_dir, fake_run, restored, logging_steps=logging_steps)

    for name in (HISTORY_NAME, METRICS_NAME):
        whole, resumed = read_strict(tmp_path / "whole" / name), read_strict(run_dir / name)
        if restored == 0:
            # From the beginning: evaluations and answers before training are made again, in the same places.
            whole.pop("samples", None)
            resumed.pop("samples", None)
        assert without_times(resumed) == without_times(whole)
    sessions = read_strict(run_dir / HISTORY_NAME)["sessions"]
    assert [session["resumed_from"] for session in sessions] == [{}, dict.fromkeys(NAMES, restored)]


@pytest.mark.faults
def test_a_killed_process_leaves_a_history_that_reaches_its_checkpoint(
    tmp_path, fake_run_path, fake_run, read_strict
):
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    code = f"""
import os, runpy, signal
from pathlib import Path
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.records import StepRecord
fake = runpy.run_path({str(fake_run_path)!r})
writer = HistoryWriter(Path({str(run_dir)!r}))
writer.handle(fake["start"]({NAMES}, {NUM_STEPS}))
for record in fake["records"]({NAMES}, {NUM_STEPS}):
    if isinstance(record, StepRecord) and record.step == 41 and record.participant == "en-US":
        writer.flush()
    if isinstance(record, StepRecord) and record.step == 49:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.handle(record)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resume(run_dir, fake_run, 40)
    write_whole_run(tmp_path / "whole", fake_run)
    whole, resumed = (read_strict(folder / HISTORY_NAME) for folder in (tmp_path / "whole", run_dir))
    assert without_times(resumed) == without_times(whole)


def test_every_field_of_a_step_is_kept_exactly(tmp_path, fake_run, read_strict):
    write_whole_run(tmp_path / "run", fake_run)
    rows = read_strict(tmp_path / "run" / HISTORY_NAME)["steps"]
    assert [(row["step"], row["participant"]) for row in rows] == [
        (step, name) for step in range(1, NUM_STEPS + 1) for name in NAMES
    ]
    expected = fake_run.step_record("fr-FR", 12, NUM_STEPS, 0.0)
    row = rows[2 * 11 + 1]
    for field in dataclasses.fields(StepRecord):
        if field.name in ("step_seconds", "tokens_per_second"):
            assert row[field.name] == pytest.approx(getattr(expected, field.name), rel=1e-2)
        elif field.name != "num_steps":
            assert row[field.name] == getattr(expected, field.name)


def test_a_step_is_recorded_every_logging_steps_and_when_the_loss_is_lost(tmp_path, fake_run, read_strict):
    writer = HistoryWriter(tmp_path, logging_steps=10)
    for step in range(1, 26):
        record = fake_run.step_record("m", step, 25, 0.0)
        writer.handle(dataclasses.replace(record, loss=math.nan) if step == 13 else record)
    writer.close()
    rows = read_strict(tmp_path / HISTORY_NAME)["steps"]
    assert [row["step"] for row in rows] == [1, 10, 13, 20, 25]


def test_numbers_that_json_lacks_are_strings_and_survive_a_resume(tmp_path, fake_run, read_strict):
    losses = [1.0, math.nan, math.inf, -math.inf]
    writer = HistoryWriter(tmp_path)
    for step, loss in enumerate(losses, 1):
        record = fake_run.step_record("m", step, 4, 0.0)
        writer.handle(dataclasses.replace(record, loss=loss, grad_norm=None if step == 1 else math.inf))
    metrics = {"loss": math.nan, "perplexity": math.inf}
    writer.handle(
        EvaluationRecord(participant="m", step=4, epoch=1, phase="after", metrics=metrics, seconds=0.1)
    )
    writer.close()
    content = read_strict(tmp_path / HISTORY_NAME)
    assert [row["loss"] for row in content["steps"]] == [1.0, "NaN", "Infinity", "-Infinity"]
    assert content["steps"][0]["grad_norm"] is None
    assert content["evaluations"][0]["metrics"] == {"loss": "NaN", "perplexity": "Infinity"}
    summary = read_strict(tmp_path / METRICS_NAME)["participants"]["m"]
    assert summary["num_non_finite_losses"] == 3
    assert summary["best_train_loss"] == 1.0

    resumed = HistoryWriter(tmp_path, restored_steps={"m": 4})
    assert [repr(x) for x in resumed.history.series["m"]["loss"]] == [repr(x) for x in losses]
    resumed.close()
    assert read_strict(tmp_path / HISTORY_NAME)["steps"] == content["steps"]


def test_a_fast_run_does_not_write_at_every_step(tmp_path, fake_run):
    writer = HistoryWriter(tmp_path)
    begin = time.monotonic()
    written = set()
    for step in range(1, 501):
        writer.handle(fake_run.step_record("m", step, 500, 0.0))
        written.add((tmp_path / HISTORY_NAME).stat().st_mtime_ns)
    # The first step and then at most one write in two seconds, however slow this machine is.
    assert len(written) <= 2 + (time.monotonic() - begin) / 2
    writer.close()


def test_an_evaluation_that_is_made_again_replaces_the_earlier_one(tmp_path, fake_run):
    writer = HistoryWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.handle(fake_run.step_record("m", step, 4, 0.0))
        if step % 2 == 0:
            for _ in range(2):
                writer.handle(fake_run.evaluation("m", step, 4, "during"))
    losses = list(writer.history.series["m"]["loss"])
    assert [(e["step"], e["train_loss"]) for e in writer.history.evaluations] == [
        (2, pytest.approx((losses[0] + losses[1]) / 2)),
        (4, pytest.approx((losses[2] + losses[3]) / 2)),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "steps": []}'])
def test_a_damaged_history_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / HISTORY_NAME).write_text(text)
    with pytest.raises(RunDirectoryError, match=HISTORY_NAME):
        HistoryWriter(tmp_path, restored_steps={"m": 1})


def test_a_run_that_ends_without_a_word_is_failed(tmp_path, fake_run, read_strict):
    writer = HistoryWriter(tmp_path)
    writer.handle(fake_run.start(["m"], 5))
    writer.flush()
    assert read_strict(tmp_path / METRICS_NAME)["status"] == "running"
    writer.close()
    assert read_strict(tmp_path / METRICS_NAME)["status"] == "failed"


def test_metrics_summarise_what_the_history_holds(tmp_path, fake_run, read_strict):
    write_whole_run(tmp_path / "run", fake_run)
    summary = read_strict(tmp_path / "run" / METRICS_NAME)
    steps = [fake_run.step_record("en-US", step, NUM_STEPS, 0.0) for step in range(1, NUM_STEPS + 1)]
    part = summary["participants"]["en-US"]
    assert part["steps"] == NUM_STEPS
    assert part["final_train_loss"] == steps[-1].loss
    assert part["best_train_loss"] == min(step.loss for step in steps)
    assert part["peak_memory_bytes"] == max(step.memory_bytes for step in steps)
    # The first step, three times as slow, does not count.
    speeds = sorted(round(step.tokens_per_second, 2) for step in steps[1:])
    assert part["tokens_per_second"]["median"] == pytest.approx(quantile(speeds, 0.5), rel=1e-6)
    assert part["evaluation"]["loss"]["best"] == part["evaluation"]["loss"]["final"]
    assert part["evaluation"]["accuracy"]["best"] > part["evaluation"]["accuracy"]["before"]
    assert summary["total_tokens"] == 2 * 1250 * NUM_STEPS


def test_non_measured_is_nan():
    assert math.isnan(as_float(None))
    assert as_float("-Infinity") == -math.inf
