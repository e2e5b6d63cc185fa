import dataclasses
import math
import re

import pytest

from toolkit.reporting.charts import Line, Rule, line_chart
from toolkit.reporting.heat_map import heat_map
from toolkit.reporting.history_writer import HistoryWriter
from toolkit.reporting.records import AlertRecord, ComparisonRecord, MergeRecord
from toolkit.reporting.report import ReportWriter, render

NUM_EPOCHS = 6


@pytest.fixture
def draw(fake_rounds, tmp_path, page_of):
    def draw(count=4, *extra, change=lambda record: record):
        run = fake_rounds.FakeRounds(fake_rounds.LOCALES[:count], NUM_EPOCHS)
        writer = HistoryWriter(tmp_path)
        for record in [run.start(), *run.records(), *extra, run.end(tmp_path)]:
            writer.handle(change(record))
        return page_of(render(writer.history, config={"model": "m"}, run_dir=tmp_path))

    return draw


def labels(page) -> list[str]:
    return [svg["aria-label"] for svg in page.all("svg") if svg.get("role") == "img"]


def test_the_page_of_a_run_in_rounds(draw):
    page = draw()
    assert not page.all("script")
    # Participants need not have made the same number of steps when they are merged.
    assert [label for label in labels(page) if label.endswith("by step")] == []
    assert labels(page)[:3] == ["loss by epoch", "accuracy by epoch", "f1 by epoch"]
    for name in ("en-US", "fr-FR", "de-DE", "sq-AL"):
        assert f"{name}: accuracy by epoch" in labels(page)
        assert f"{name}: training loss by epoch" in labels(page)
    order = [
        "Did merging help?",
        "Curves",
        "Participants side by side",
        "Weights",
        "Merges",
        "Alerts",
        "Evaluations",
    ]
    places = [page.text.find(heading) for heading in order if heading != "Alerts"]
    assert places == sorted(places)
    assert min(places) > 0
    for expected in (
        "improvement",
        "no difference",
        "every 2 epochs",
        "toward" not in page.text and "stopped",
    ):
        assert expected in page.text
    assert "2 of 4helped" in page.text.replace("\n", "")
    assert "5, 3taken over, refused by the gate" in page.text.replace("\n", "")


def test_merges_stand_on_the_time_axis(draw):
    page = draw()
    rules = [line for line in page.all("line") if (line.get("class") or "").startswith("rule ")]
    tones = [line["class"].split()[1] for line in rules]
    num_curves = len([label for label in labels(page) if ":" not in label and label.endswith("by epoch")])
    assert tones.count("merged") == 3 * num_curves
    # Two charts a participant: en-US took three, fr-FR and de-DE one each before they left, sq-AL refused three.
    assert tones.count("accepted") == 2 * (3 + 1 + 1)
    assert tones.count("rejected") == 2 * 3
    assert page.text.count("merge after epoch 2: linear, rejected") == 2


def test_small_multiples_have_the_same_axes(draw, fake_rounds, tmp_path):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], NUM_EPOCHS)
    writer = HistoryWriter(tmp_path)
    for record in [run.start(), *run.records()]:
        is_of_one = getattr(record, "participant", None) == "fr-FR" and hasattr(record, "loss")
        writer.handle(dataclasses.replace(record, loss=record.loss * 10) if is_of_one else record)
    text = render(writer.history, config={}, run_dir=tmp_path)
    ticks = {
        name: re.findall(r'<text class="tick"[^>]*>([^<]*)</text>', chart)
        for name, chart in re.findall(
            r'aria-label="([\w-]+): training loss by epoch">(.*?)</svg>', text, re.DOTALL
        )
    }
    assert ticks["en-US"] == ticks["fr-FR"]
    assert float(max(ticks["en-US"][:-1], key=float)) >= 20


def test_weights_that_stay_the_same_are_drawn_once(draw, fake_rounds):
    def with_constant_weights(record):
        same = {"sq-AL": {"en-US": 0.75, "sq-AL": 0.25}}
        return dataclasses.replace(record, weights=same) if isinstance(record, MergeRecord) else record

    page = draw(change=with_constant_weights)
    assert labels(page).count("weights of the merge") == 1
    assert "after epoch 2, 4, 6" in page.text
    # Epochs 4 and 6 merge fewer participants than epoch 2.
    assert labels(draw()).count("weights of the merge") == 2


def test_alerts_and_failed_merges_are_shown(draw, fake_rounds):
    alert = AlertRecord(
        kind="loss_explosion", participant="en-US", step=3, message="en-US, step 3: <b>9.9</b>"
    )
    failed = dataclasses.replace(
        fake_rounds.FakeRounds(fake_rounds.LOCALES[:4], NUM_EPOCHS).merge(4),
        round=5,
        status="failed",
        attempts=3,
        error="keys <differ>",
    )
    page = draw(4, alert, failed)
    assert "loss explosion" in page.text
    assert "en-US, step 3: <b>9.9</b>" in page.text
    assert "keys <differ>" in page.text
    assert "3 attempts" in page.text
    assert any("rule failed" in (line.get("class") or "") for line in page.all("line"))


def test_what_comes_from_outside_is_escaped(draw):
    evil = "<script>alert(1)</script>\"'&"

    def poisoned(record):
        if isinstance(record, MergeRecord):
            weights = {evil: {evil: 1.0}}
            return dataclasses.replace(
                record,
                reason=evil,
                method=evil,
                path=evil,
                weights=weights,
                participants=[evil],
                gate={evil: None},
            )
        if isinstance(record, ComparisonRecord):
            return dataclasses.replace(record, columns=[evil], rows=[[evil]], notes=[evil])
        return record

    page = draw(change=poisoned)
    assert not page.all("script")
    assert page.text.count("alert(1)") > 6


@pytest.mark.parametrize("count", [1, 2, 24])
def test_few_and_many(draw, count):
    page = draw(count)
    assert "nan" not in str([attributes.get("d") for attributes in page.all("path")])
    assert len([label for label in labels(page) if label.endswith(": accuracy by epoch")]) == count


def test_a_run_without_rounds_has_nothing_of_them(fake_run, tmp_path, page_of):
    writer = HistoryWriter(tmp_path)
    for record in [fake_run.start(["a", "b"], 9), *fake_run.records(["a", "b"], 9), fake_run.end(tmp_path)]:
        writer.handle(record)
    page = page_of(render(writer.history, config={}, run_dir=tmp_path))
    for word in ("Merges", "Weights", "side by side", "Alerts", "Did merging help?", "helped"):
        assert word not in page.text
    assert all(label.endswith("by step") for label in labels(page))


def test_the_report_is_drawn_at_merges_too(fake_rounds, tmp_path):
    run = fake_rounds.FakeRounds(["en-US", "fr-FR"], 2)
    writer = HistoryWriter(tmp_path)
    report = ReportWriter(tmp_path, writer.history, config={})
    for record in (run.start(), run.step("en-US", 1), run.merge(2)):
        for listener in (writer, report):
            listener.handle(record)
    assert "merge after epoch 2" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_rule_beyond_the_chart_is_left_out():
    lines = [Line(name="n", colour=0, points=[(0.0, 1.0), (4.0, 2.0)])]
    svg = line_chart(lines, label="l", rules=[Rule(x=3, text="in"), Rule(x=5, text="out")])
    assert "<title>in</title>" in svg
    assert "<title>out</title>" not in svg


def test_a_heat_map_is_strongest_where_the_weight_is_largest():
    svg = heat_map(["a", "b"], ["a", "b"], {"a": {"a": 0.5, "b": 0.25}, "b": {"a": 0.0}}, label="weights")
    assert re.findall(r'class="share"[^>]*fill-opacity="([\d.]+)"', svg) == ["1.000", "0.500", "0.000"]
    assert re.findall(r'class="number (?:on|off)"[^>]*>([^<]*)<', svg) == ["0.50", "0.25", "0.00"]
    many = [f"x{number}" for number in range(30)]
    wide = heat_map(many, many, {row: dict.fromkeys(many, 1 / 30) for row in many}, label="weights")
    assert wide.count('class="share"') == 900
    assert 'class="number' not in wide
    assert heat_map([], [], {}, label="weights") == ""


def test_a_merge_without_metrics_is_drawn(draw):
    def without_metrics(record):
        if isinstance(record, MergeRecord):
            return dataclasses.replace(record, before={}, after={})
        return record

    assert "linear of en-US" in draw(change=without_metrics).text


def test_metrics_that_are_lost_do_not_break_the_page(draw):
    def lose(record):
        if isinstance(record, MergeRecord):
            lost = {name: {"loss": math.nan, "accuracy": 0.5} for name in record.after}
            return dataclasses.replace(record, after=lost)
        return record

    assert "nan" in draw(change=lose).text
