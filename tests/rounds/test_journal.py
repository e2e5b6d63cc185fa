import json

import pytest

from toolkit.errors import CheckpointError
from toolkit.rounds.journal import Journal


def test_records_survive_and_continue(tmp_path):
    journal = Journal(tmp_path)
    journal.append("created", recipe="r")
    journal.append("evaluation", metrics={"loss": 0.1})
    again = Journal(tmp_path)
    assert [r["event"] for r in again.records()] == ["created", "evaluation"]
    assert again.append("finished")["number"] == 3
    assert Journal(tmp_path).records("evaluation")[0]["metrics"] == {"loss": 0.1}


@pytest.mark.faults
def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(tmp_path).append("created", text="ü")
    whole = path.read_bytes()
    Journal(tmp_path).append("checkpoint", step=4)
    complete = path.read_bytes()
    for length in range(len(whole), len(complete)):
        path.write_bytes(complete[:length])
        journal = Journal(tmp_path)
        assert [r["event"] for r in journal.records()] == ["created"], length
        journal.append("checkpoint", step=5)
        assert [r.get("step") for r in Journal(tmp_path).records()] == [None, 5]


def test_damage_before_the_end_is_an_error(tmp_path):
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append("checkpoint", step=step)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"event": \n' + lines[2])
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2 is damaged"):
        Journal(tmp_path)


def test_nan_is_refused_and_other_processes_write_nothing(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        journal.append("evaluation", loss=float("nan"))
    assert journal.records() == []
    reader = Journal(tmp_path, writable=False)
    reader.append("created")
    assert reader.records("created")
    assert not (tmp_path / "journal.jsonl").exists()


def test_lines_are_json(tmp_path):
    Journal(tmp_path).append("created", a=1)
    assert json.loads((tmp_path / "journal.jsonl").read_text())["a"] == 1
