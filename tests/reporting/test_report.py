import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.reporting import charts, wording
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.records import MessageRecord, RunEnd, SampleRecord, StepRecord
from toolkit.reporting.report import ReportWriter, render


@pytest.fixture
def draw(fake_run, tmp_path, page_of):
    def draw(names, num_steps, *extra, change=lambda record: record):
        writer = HistoryWriter(tmp_path)
        writer.handle(fake_run.start(names, num_steps))
        for record in [*fake_run.records(names, num_steps), *extra]:
            writer.handle(change(record) if isinstance(record, StepRecord) else record)
        return page_of(render(writer.history, config={"model": "m", "max_steps": None}, run_dir=tmp_path))

    return draw


def test_the_page_needs_nothing_from_elsewhere(draw, fake_run, tmp_path):
    page = draw(["model"], 50, fake_run.end(tmp_path))
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or "")
    labels = [svg.get("aria-label") for svg in page.all("svg")]
    assert labels == [
        f"{name} by step"
        for name in (
            *("loss", "accuracy", "learning rate", "gradient norm", "tokens a second", "peak memory"),
            *("GPU utilisation", "GPU power"),
        )
    ]
    for expected in ("Synthetic run", "Training samples", "I am an AI model.", "3 rows repeat", "prefers"):
        assert (expected in page.text) is (expected != "prefers")


@pytest.mark.parametrize(("count", "num_steps"), [(1, 1), (1, 2), (8, 30), (20, 30)])
def test_few_and_many(draw, fake_run, count, num_steps):
    names = fake_run.participant_names(count)
    page = draw(names, num_steps)
    assert len([svg for svg in page.all("svg") if svg.get("role") == "img"]) == 8
    if count > 1:
        assert page.text.count("sq-AL") >= 1
        looks = {
            (p.get("class"), p.get("stroke-dasharray")) for p in page.all("path") if p.get("d") == "M0 5H30"
        }
        assert len(looks) == count
    assert "nan" not in str([attributes.get("d") for attributes in page.all("path")])


def test_what_comes_from_outside_is_escaped(draw):
    evil = "<script>alert(1)</script>\"'&"
    sample = SampleRecord(participant=evil, phase="after", prompt=evil, answer=evil, reference=evil)
    error = RunEnd(status="failed", error=evil, paths=[(evil, evil)], summary=[(evil, evil)])
    page = draw([evil, "other"], 20, sample, error)
    assert not page.all("script")
    assert page.text.count(evil) >= 6


def test_nested_values_are_rows_and_counts_are_no_metrics(draw):
    page = draw(["model"], 10)
    assert "lengths / median" in page.text
    assert "8984" not in page.text


def test_lost_losses_are_marked_and_break_the_line(draw):
    def lose(record):
        return dataclasses.replace(record, loss=math.nan) if record.step in (10, 11) else record

    page = draw(["model"], 30, change=lose)
    assert len([path for path in page.all("path") if path.get("class") == "lost"]) == 2
    curves = [path["d"] for path in page.all("path") if path.get("class") == "s0 faint"]
    # The loss is the first chart; in the others nothing is lost.
    assert [d.count("M") for d in curves if d] == [2, 1, 1, 1, 1]


def test_a_run_with_nothing_finite_has_no_loss_chart(draw):
    page = draw(
        ["model"], 3, change=lambda record: dataclasses.replace(record, loss=math.inf, grad_norm=None)
    )
    labels = [svg.get("aria-label") for svg in page.all("svg")]
    assert "gradient norm by step" not in labels
    assert "loss by step" in labels  # its evaluations are finite


def test_the_report_is_drawn_while_the_run_is_on_and_at_its_end(fake_run, tmp_path, page_of):
    writer = HistoryWriter(tmp_path)
    report = ReportWriter(tmp_path, writer.history, config={})
    path = tmp_path / "report.html"
    for record in [fake_run.start(["m"], 30), *fake_run.records(["m"], 30)]:
        for listener in (writer, report):
            listener.handle(record)
    assert page_of(path.read_text(encoding="utf-8")).all("meta")[-1] == {
        "http-equiv": "refresh",
        "content": "30",
    }
    for listener in (writer, report):
        listener.handle(MessageRecord(level="info", text="nothing to draw"))
        listener.handle(fake_run.end(tmp_path))
    text = path.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in text
    assert ">done<" in text


finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_enclose_the_values_and_are_round_and_few(low, span, count):
    high = low + span
    if not high > low + 1e-9 * max(abs(low), abs(high)):
        return
    ticks = charts.nice_ticks(low, high, count)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= count + 3
    mantissa = step / 10 ** math.floor(math.log10(step * 1.000001))
    assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1e-4, False, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (0.37, 3.3, False, [0, 1, 2, 3, 4]),
        (0, 1, True, [0, 1]),
        (0, 0, True, [0, 1]),
        (2.0, 2.0, False, [1.8, 1.9, 2.0, 2.1, 2.2]),
    ],
)
def test_ticks(low, high, whole, expected):
    assert charts.nice_ticks(low, high, 5, whole=whole) == pytest.approx(expected)


def test_thinning_keeps_extremes_and_lost_values():
    points = [(float(x), math.sin(x / 1000)) for x in range(100_000)]
    points[34_567] = (34_567.0, 9.0)
    points[50_001] = (50_001.0, math.nan)
    thin = charts.thinned(points)
    assert len(thin) <= charts.MAX_POINTS
    assert (34_567.0, 9.0) in thin
    assert any(math.isnan(y) for _, y in thin)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_smoothing_has_no_bias_at_its_start_and_skips_lost_values():
    constant = charts.smoothed([(float(x), 2.0) for x in range(500)])
    assert [y for _, y in constant] == pytest.approx([2.0] * 500)
    smooth = charts.smoothed([(1, 1.0), (2, math.nan), (3, 3.0)])
    assert math.isnan(smooth[1][1])
    assert math.isfinite(smooth[2][1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.1, "0.1"), (5e-5, "5e-5"), (1500, "1500"), (20_000, "20k"), (1e6, "1M"), (-2.5e6, "-2.5M")],
)
def test_tick_labels(value, expected):
    assert wording.tick(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.2451, "0.2451"),
        (12.3456, "12.346"),
        (1234.5, "1234.5"),
        (1e-7, "1.00e-07"),
        (0, "0.0000"),
        (None, "-"),
    ],
)
def test_numbers(value, expected):
    assert wording.number(value) == expected
    assert wording.number("NaN") == "nan"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(7.4, "0:07"), (754, "12:34"), (10_921, "3:02:01"), (183_600, "2d 03:00"), (math.inf, "-"), (None, "-")],
)
def test_durations(seconds, expected):
    assert wording.duration(seconds) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1.9e9, "1.90 GB"), (23.46e9, "23.5 GB"), (5e12, "5.00 TB")],
)
def test_sizes(num_bytes, expected):
    assert wording.size(num_bytes) == expected
