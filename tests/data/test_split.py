"""Splitting: complete, stratified, by seed, equal rows together, and nothing is overwritten unasked."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.config.data_commands import SplitConfig
from toolkit.data.split import assign, split_data
from toolkit.errors import DataError


@pytest.fixture
def split(tmp_path):
    def run(data, **values):
        values.setdefault("out", tmp_path / "out")
        return split_data(SplitConfig(data=data, **values))

    return run


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def labelled(write_jsonl):
    rows = [
        {"utt": f"say {label} {n} ë", "intent": label}
        for label, k in (("a", 100), ("b", 50), ("c", 10))
        for n in range(k)
    ]
    return write_jsonl(rows), rows


def test_files_of_fractions_are_complete_and_stratified(split, labelled, tmp_path):
    data, rows = labelled
    written = split(data)
    parts = {name: read(tmp_path / "out", f"{name}.json") for name in ("train", "valid", "test")}
    assert sorted(written.values()) == [16, 16, 128]
    key = json.dumps
    assert sorted(key(row) for part in parts.values() for row in part) == sorted(key(row) for row in rows)
    assert Counter(row["intent"] for row in parts["train"]) == {"a": 80, "b": 40, "c": 8}
    assert Counter(row["intent"] for row in parts["valid"]) == {"a": 10, "b": 5, "c": 1}


def test_clients_get_equal_shares_and_a_common_valid_file(split, labelled, tmp_path):
    written = split(labelled[0], clients=2, valid_fraction=0.2)
    assert {path.name: n for path, n in written.items()} == {
        "client_0.json": 64,
        "client_1.json": 64,
        "valid.json": 32,
    }
    assert len(split(labelled[0], out=tmp_path / "none", clients=3, valid_fraction=0.0)) == 3


def test_the_same_seed_gives_the_same_files(split, labelled, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split(labelled[0], out=tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "train.json").read_bytes() for name in "abc")
    assert a == b != c


def test_rows_of_equal_content_stay_together(split, write_jsonl, make_chat, tmp_path):
    rows = [
        make_chat(f"Question {n % 10}".upper() if n > 20 else f"question  {n % 10}", "yes") for n in range(40)
    ]
    split(write_jsonl(rows), fractions=[0.5, 0.5])
    keys = [
        {row["messages"][0]["content"].split()[1] for row in read(tmp_path / "out", f)}
        for f in ("train.json", "valid.json")
    ]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 10


def test_nothing_is_overwritten_unasked(split, labelled, tmp_path):
    data = labelled[0]
    split(data)
    before = (tmp_path / "out" / "train.json").read_bytes()
    with pytest.raises(DataError, match=r"train.json.* exist already"):
        split(data, seed=9)
    assert (tmp_path / "out" / "train.json").read_bytes() == before
    split(data, seed=9, overwrite=True)
    assert (tmp_path / "out" / "train.json").read_bytes() != before
    with pytest.raises(DataError, match="holds files of another split"):
        split(data, clients=2, overwrite=True)


@pytest.mark.parametrize("fractions", [[1.0], [0.5, 0.6], [0.9, 0.1, 0.0], [0.25] * 4])
def test_wrong_fractions(split, labelled, fractions):
    with pytest.raises(DataError, match="two or three positive shares with the sum 1"):
        split(labelled[0], fractions=fractions)


def test_too_few_rows(split, write_jsonl, make_chat):
    with pytest.raises(DataError, match="2 rows are too few, nothing is left for"):
        split(write_jsonl([make_chat("a", "b"), make_chat("c", "d")]), clients=5)


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.integers(0, 40), min_size=1, max_size=80), seed=st.integers(0, 5))
def test_every_row_goes_to_one_part_and_shares_are_met(keys, seed):
    digests = [bytes([key]) for key in keys]
    strata = [str(key % 3) for key in keys]
    shares = {"train": 0.6, "valid": 0.3, "test": 0.1}
    parts = assign(digests, strata, shares, seed)
    assert sorted(n for rows in parts.values() for n in rows) == list(range(len(keys)))
    homes = [{digests[n] for n in rows} for rows in parts.values()]
    assert sum(map(len, homes)) == len(set(digests))
    if len(set(keys)) == len(keys):
        for name, rows in parts.items():
            assert abs(len(rows) - shares[name] * len(keys)) <= 3, "at most one row a label"
