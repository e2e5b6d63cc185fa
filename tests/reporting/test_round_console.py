import dataclasses
import io
import re

import pytest
import rich.console
from rich.cells import cell_len

from toolkit.reporting import round_wording
from toolkit.reporting.console import Console
from toolkit.reporting.progress import Progress, ProgressBars, seconds_left_of_all
from toolkit.reporting.records import ComparisonRecord, StepRecord
from toolkit.reporting.round_view import RoundView, comparison_table

NUM_EPOCHS = 6


@pytest.fixture
def run(fake_rounds):
    return fake_rounds.FakeRounds(fake_rounds.LOCALES[:4], NUM_EPOCHS)


def plain_output(run, *, log_level="INFO") -> str:
    stream = io.StringIO()
    console = Console(stream=stream, clock=lambda: 0.0, log_level=log_level)
    console.handle(run.start())
    for record in run.records():
        console.handle(record)
    console.close()
    return stream.getvalue()


def test_a_pipe_gets_merges_alerts_and_the_comparison_as_plain_lines(run):
    text = plain_output(run)
    assert "\x1b" not in text
    lines = text.splitlines()
    place = lines.index("  merge after epoch 2: linear of en-US, fr-FR, de-DE, sq-AL, 1.2 s (every 2 epochs)")
    assert lines[place + 1].startswith("    en-US  accuracy 0.7391 -> 0.7591  accepted  0.79 en-US, ")
    assert lines[place + 4].startswith("    sq-AL  accuracy 0.6791 -> 0.6491  rejected  0.81 sq-AL, ")
    assert "  epoch 1/6 done, 4 active, 0:12" in lines
    assert "    no merge: the next one is due after epoch 2" in lines
    assert (
        "  alert (non finite loss): de-DE, step 50: the training loss is nan" not in lines
    )  # no monitor here
    assert lines.count("    fr-FR stopped early: no better for 2 evaluations (accuracy 0.8123)") == 1
    table = lines[lines.index("Did merging help?") + 1 :]
    assert re.fullmatch(
        r"locale +base +own training +last merge +best source +iterative +improvement +verdict", table[0]
    )
    assert table[3].endswith("hurt")
    assert table[5].startswith("accuracy on held-out rows")
    # Checkpoints of many participants are in the log only.
    assert "checkpoint" not in text
    assert "checkpoint" in plain_output(run, log_level="DEBUG")


def bars_of(run, width, *, epoch) -> list[str]:
    """The live lines of a terminal of that width, after the given epoch."""
    stream = io.StringIO()
    console = rich.console.Console(
        file=stream, width=width, height=30, force_terminal=True, color_system=None
    )
    progress = {name: Progress(name, NUM_EPOCHS) for name in run.names}
    view = RoundView(progress, lambda: 0.0)
    for number in range(1, epoch + 1):
        for record in run.round(number):
            if isinstance(record, StepRecord):
                progress[record.participant].update(record)
                view.begin()
            elif hasattr(record, "gate") or hasattr(record, "active"):
                view.lines(record)
            elif hasattr(record, "phase"):
                progress[record.participant].show_metrics(record.metrics)
    with console.capture() as capture:
        console.print(ProgressBars(console, progress, footer=view.footer).render())
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_live_lines_fit_and_say_who_is_out(run, width, epoch):
    lines = bars_of(run, width, epoch=epoch)
    assert len(lines) == 5
    assert all(cell_len(line) <= width for line in lines)
    by_name = {line.split()[0]: line for line in lines}
    if epoch == 5 and width >= 60:
        assert by_name["fr-FR"].rstrip().endswith("stopped early")
        assert by_name["de-DE"].rstrip().endswith("failed")
    assert lines[-1].startswith(f"  all  epoch {epoch}/6 done")
    assert ("merge" in lines[-1]) is (epoch >= 2)


def test_live_lines_show_the_metric_after_the_merge_that_was_taken(run):
    lines = bars_of(run, 140, epoch=2)
    after, before = run.merge(2).after, run.merge(2).before
    assert f"acc {after['en-US']['accuracy']:.4f}" in lines[0]
    # sq-AL refused it, and trained last.
    assert lines[3].startswith("▶ sq-AL 2/6")
    assert f"acc {before['sq-AL']['accuracy']:.4f}" in lines[3]
    for wanted in ("loss ", "tok/s", " left", "40/120"):
        assert all(wanted in line for line in lines[:4]), wanted


def test_time_left_of_all_counts_pauses_and_not_those_that_are_out(run):
    progress = {name: Progress(name, NUM_EPOCHS) for name in run.names}
    assert seconds_left_of_all(progress.values(), 1.0) is None
    for name in run.names[:2]:
        for step in (41, 42, 43, 44):
            progress[name].update(run.step(name, step))
    # 8 steps in 80 s, evaluations included; 76 are left of each that began, and 120 of each that did not.
    assert seconds_left_of_all(progress.values(), 80.0) == pytest.approx(10 * (2 * 76 + 2 * 120))
    progress[run.names[1]].status = "failed"
    progress[run.names[3]].status = "failed"
    assert seconds_left_of_all(progress.values(), 80.0) == pytest.approx(10 * (76 + 120))


def test_a_merge_for_all_says_its_weights_once(run, fake_rounds):
    record = dataclasses.replace(run.merge(2), weights={"sq-AL": {"en-US": 0.6, "sq-AL": 0.4, "fr-FR": 0.0}})
    lines = round_wording.merge_lines(record)
    assert lines[1] == "toward sq-AL: 0.60 en-US, 0.40 sq-AL"
    assert [line.count("0.60") for line in lines[2:]] == [0, 0, 0, 0]


def test_a_merge_of_many_is_short_on_the_terminal_and_complete_in_the_log(fake_rounds):
    many = fake_rounds.FakeRounds([f"x{number:02d}" for number in range(40)], 4)
    record = many.merge(2)
    short, complete = (round_wording.merge_lines(record, is_complete=flag) for flag in (False, True))
    assert len(short) == 1 + round_wording.MAX_ROWS
    assert short[-1] == "and 29 more: see merge_history.json"
    assert "and 33 more" in short[0]
    assert len(complete) == 1 + 40
    assert "f1" in complete[1]
    assert "f1" not in short[1]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1.0}, "1.00 a"),
        ({"a": 0.5, "b": 0.5, "c": 0.0}, "0.50 a, 0.50 b"),
        (
            {"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.1, "e": 0.06, "f": 0.04},
            "0.30 a, 0.30 b, 0.20 c, 0.10 d, 0.10 of 2 others",
        ),
        ({}, ""),
    ],
)
def test_weights_in_short(weights, expected):
    assert round_wording.weights_in_short(weights) == expected


def test_merges_that_were_not_made_say_why(run):
    failed = dataclasses.replace(run.merge(2), status="failed", attempts=3, error="keys differ")
    assert round_wording.merge_lines(failed) == [
        "merge after epoch 2 (linear of en-US, fr-FR, de-DE, sq-AL) failed after 3 attempts: keys differ"
    ]
    skipped = dataclasses.replace(run.merge(2), status="skipped", error="one participant is left")
    assert round_wording.merge_lines(skipped) == ["no merge after epoch 2: one participant is left"]


@pytest.mark.parametrize("width", [80, 90, 100, 140])
def test_the_comparison_fits_and_loses_nothing(run, width):
    record: ComparisonRecord = run.comparison()
    console = rich.console.Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(comparison_table(record, width))
    lines = capture.get().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    text = capture.get()
    assert "…" not in text
    for row in record.rows:
        for word in " ".join(row).split():
            assert word in text
    # An interval is never broken.
    assert text.count("[+0.0101, +0.0313]") == len(record.rows)
    assert len(lines) == (1 + 4 if width >= 104 else 2 + 2 * 4)


def test_nothing_is_drawn_before_the_first_step_and_after_the_end(run, monkeypatch):
    """An evaluation before training, or an alert after the comparison, must not bring the bars (back)."""
    monkeypatch.setattr("toolkit.reporting.console.is_interactive", lambda _: True)
    stream = io.StringIO()
    console = Console(stream=stream, clock=lambda: 0.0)
    console.handle(run.start())
    console.handle(run.evaluation("en-US", 0, "before"))
    assert "━" not in stream.getvalue()
    for record in run.records():
        console.handle(record)
    drawn = stream.getvalue().count("  all ")
    assert drawn > 1
    console.handle(run.evaluation("en-US", 6, "after"))
    console.handle(run.merge(6))
    assert stream.getvalue().count("  all ") == drawn
    console.close()
