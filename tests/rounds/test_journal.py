import json
import threading
from collections.abc import Callable
from typing import Any

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


def test_what_was_taken_back_stays_in_the_file_and_leaves_the_records(tmp_path):
    journal = Journal(tmp_path)
    for event, step in (("created", 0), ("loop", 1), ("evaluation", 2), ("checkpoint", 2), ("merge", 2)):
        journal.append(event, step=step)
    journal.rewind(2)
    journal.append("evaluation", step=3)
    expected = ["created", "loop", "checkpoint", "evaluation"]
    for view in (journal, Journal(tmp_path)):
        assert [r["event"] for r in view.records() if r["event"] != "rewound"] == expected
        assert view.records("evaluation")[0]["step"] == 3
        assert view.last_number == 7
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(1, 8))
    assert [line["event"] for line in lines].count("evaluation") == 2


def test_there_is_nothing_to_take_back_but_facts_of_the_disk(tmp_path):
    journal = Journal(tmp_path)
    for event in ("created", "loop", "checkpoint", "checkpoint_deleted", "interrupted"):
        journal.append(event)
    before = (tmp_path / "journal.jsonl").read_bytes()
    journal.rewind(2)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    assert len(journal.records()) == 5


class Meeting:
    """Gathers values of threads that stand for processes."""

    def __init__(self, num_processes: int) -> None:
        self._barrier = threading.Barrier(num_processes, timeout=30)
        self._values: list[Any] = [None] * num_processes

    def gather_of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = json.loads(json.dumps(value))
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return gather

    def exchange(self, journals: list[Journal]) -> None:
        threads = [
            threading.Thread(target=journal.exchange, args=(self.gather_of(rank),))
            for rank, journal in enumerate(journals)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)


def test_journals_of_all_processes_become_equal(tmp_path):
    Journal(tmp_path).append("created")
    journals = [Journal(tmp_path, writable=rank == 0) for rank in range(3)]
    meeting = Meeting(3)
    for turn in range(2):
        for rank, journal in enumerate(journals):
            for number in range(rank + 1):
                journal.append("checkpoint", rank=rank, number_in_turn=number, turn=turn)
        meeting.exchange(journals)
        written = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
        assert [journal.records() for journal in journals] == [written] * 3
        assert len(written) == 1 + 6 * (turn + 1)
    own = [(r["rank"], r["turn"]) for r in journals[1].records("checkpoint")]
    assert own == sorted(own, key=lambda pair: pair[1])
    meeting.exchange(journals)  # nothing is new, nothing is written
    assert len(Journal(tmp_path).records()) == len(written)


def test_a_record_taken_back_by_the_writer_is_gone_from_all(tmp_path):
    journals = [Journal(tmp_path, writable=rank == 0) for rank in range(2)]
    meeting = Meeting(2)
    journals[0].append("loop", epoch=1)
    journals[1].append("evaluation", epoch=2)
    meeting.exchange(journals)
    for journal in journals:
        journal.rewind(1)
    journals[1].append("evaluation", epoch=3)
    meeting.exchange(journals)
    for journal in (*journals, Journal(tmp_path)):
        assert [r["epoch"] for r in journal.records() if r["event"] != "rewound"] == [1, 3]
