"""Files of every kind, and the one message that a wrong one gives."""

import csv
import json

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from toolkit.data.read import open_source, read_table
from toolkit.errors import DataError

ROWS = [
    {"text": "one", "label": "a"},
    {"text": 'two, "2"\n', "label": "b"},
    {"text": "drei ß 漢\u2028!", "label": "a"},
]


def write(folder, name, rows=ROWS):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, ending):
    table = read_table(write(tmp_path, f"rows.{ending}"))
    assert [dict(row) for row in table.rows] == ROWS
    assert table.columns == ("text", "label")


def test_json_in_an_object_and_json_lines_named_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert len(read_table(str(tmp_path / "a.json"))) == len(read_table(str(tmp_path / "b.json"))) == 3
    assert len(read_table(str(tmp_path / "c.json"), split="test")) == 1


def test_saved_datasets_with_and_without_splits_and_named_labels(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_list([{"text": "x", "label": 1}], features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "two")
    assert read_table(str(tmp_path / "one")).rows[0]["label"] == "yes"
    assert set(open_source(str(tmp_path / "two")).splits) == {"train", "validation"}


def test_a_folder_with_splits_and_one_with_locales(tmp_path):
    write(tmp_path, "plain/train.jsonl")
    write(tmp_path, "plain/valid.csv", ROWS[:2])
    source = open_source(str(tmp_path / "plain"))
    assert list(source.splits) == ["train", "valid"]
    assert len(source.table("valid")) == 2
    write(tmp_path, "many/en-US/train.jsonl")
    write(tmp_path, "many/en-US/test.jsonl", ROWS[:1])
    write(tmp_path, "many/sq-AL/train.jsonl", ROWS[:1])
    write(tmp_path, "many/sq-AL/test.jsonl", ROWS[:1])
    table = open_source(str(tmp_path / "many")).table("train")
    assert [row["locale"] for row in table.rows] == ["en-US", "en-US", "en-US", "sq-AL"]
    assert table.where(3).endswith("sq-AL/train.jsonl:1")
    assert table.select([3]).where(0).endswith("sq-AL/train.jsonl:1")
    assert table.select([3]).notes == (f"{tmp_path / 'many'} [train] joins the locales en-US, sq-AL",)


@pytest.mark.parametrize("name", ["old", "raw", "tmp", "data", "en-US", "sq"])
def test_a_folder_beside_split_files_is_not_read(tmp_path, name):
    write(tmp_path, "train.jsonl")
    write(tmp_path, f"{name}/train.jsonl", ROWS[:1])
    table = open_source(str(tmp_path)).table("train")
    assert len(table) == 3
    assert table.notes == ()


@pytest.mark.parametrize("name", ["old", "raw", "tmp", "xx", "to-do", "test"])
def test_a_folder_that_is_named_like_no_locale_is_not_read_and_named(tmp_path, name):
    write(tmp_path, f"{name}/train.jsonl")
    with pytest.raises(DataError, match=rf"not looked into, as it is no locale's name: {name}/"):
        open_source(str(tmp_path))
    write(tmp_path, "sr-Latn/train.jsonl", ROWS[:1])
    assert len(open_source(str(tmp_path)).table("train")) == 1


def test_locales_with_different_splits_are_refused(tmp_path):
    write(tmp_path, "en-US/train.jsonl")
    write(tmp_path, "sq-AL/train.jsonl")
    write(tmp_path, "sq-AL/test.jsonl")
    with pytest.raises(DataError, match="en-US has train, and sq-AL has train, test"):
        open_source(str(tmp_path))


def test_the_data_folder_of_a_copy_of_a_hub_data_set(tmp_path):
    write(tmp_path, "data/train-00000-of-00001.parquet")
    table = open_source(str(tmp_path)).table("train")
    assert len(table) == 3
    assert "locale" not in table.columns


@pytest.mark.parametrize(
    ("source", "asked"),
    [("nobody/pets:en-US", ("nobody/pets", "en-US")), ("nobody/pets", ("nobody/pets", None))],
)
def test_the_configuration_of_a_hub_data_set_stands_after_a_colon(monkeypatch, source, asked):
    asked_for = []

    def load_dataset(*arguments):
        asked_for.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr("toolkit.data.read.can_reach", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = read_table(source)
    assert asked_for == [asked]
    assert table.where(1) == f"{source} [train]: row 2"


def test_a_hub_data_set_whose_configuration_is_missing(monkeypatch):
    def load_dataset(*arguments):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")

    monkeypatch.setattr("toolkit.data.read.can_reach", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        read_table("nobody/pets")
    assert "nobody/pets:CONFIGURATION" in str(error.value)


def test_line_numbers_count_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    assert read_table(str(path)).where(1) == f"{path}:4"


WRONG = {
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": "b"\n',
        r"broken.jsonl:2: broken JSON at column \d+ .*\"text\": \"b\"",
    ),
    "number.jsonl": (
        b'{"text": "a"}\n3\n',
        r"number.jsonl:2: a JSON object is needed on each line, not a number",
    ),
    "broken.json": (b'[{"text": "a"},\n {"text": }]', r"broken.json:2: broken JSON at column"),
    "object.json": (b'{"text": "a"}', r"object.json: a JSON array of rows is needed"),
    "scalar.json": (b"[1]", r"scalar.json: row 1 is a number; an object is needed"),
    "empty.jsonl": (b"", r"empty.jsonl is empty"),
    "blank.jsonl": (b"\n \n", r"blank.jsonl is empty"),
    "no-rows.json": (b"[]", r"no-rows.json is empty: it has no rows"),
    "header.csv": (b"text,label\n", r"header.csv is empty: it has no rows"),
    "fields.csv": (b"text,label\na,b\nc\n", r"fields.csv:3: 1 fields, and the first line names 2 columns"),
    "quote.csv": (b'text,label\n"a,b\n', r"quote.csv:\d+: broken CSV"),
    "twice.csv": (b"text,text\na,b\n", r"twice.csv:1: a column name appears twice"),
    "latin.jsonl": (
        '{"text": "a"}\n{"text": "gr\xfcn"}'.encode("latin-1"),
        r"latin.jsonl:2: the byte 0xfc is not UTF-8",
    ),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), r"wide.jsonl is in UTF-16"),
    "bad.parquet": (b"not parquet at all", r"bad.parquet is not a readable Parquet file"),
    "one-row.json": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        r"one-row.json: a JSON array of rows is needed(.|\n)*put a single row in brackets",
    ),
    "notes.txt": (b"hello", r"notes.txt: cannot read files that end in .txt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(str(tmp_path / name))


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"tarin.jsonl does not exist") as error:
        read_table(str(tmp_path / "tarin.jsonl"))
    assert "did you mean" in str(error.value)
    assert str(tmp_path / "train.jsonl") in str(error.value)
    with pytest.raises(DataError, match="there is no folder"):
        read_table(str(tmp_path / "nowhere" / "deep" / "train.jsonl"))


def test_a_folder_without_splits_and_a_missing_split(tmp_path):
    write(tmp_path, "a.jsonl")
    write(tmp_path, "b.jsonl")
    with pytest.raises(DataError, match=r"no file is named after a split \(a.jsonl, b.jsonl\)"):
        open_source(str(tmp_path))
    write(tmp_path, "s/train.jsonl")
    with pytest.raises(DataError, match=r"has no split named 'trian'; did you mean 'train'\?"):
        read_table(str(tmp_path / "s"), split="trian")


def test_an_unknown_name_without_a_network_is_one_message_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        DataError, match=r"neither a file or folder here nor in the cache, and https://hub.invalid cannot"
    ):
        read_table("nobody/no-such-data-set")
    monkeypatch.setattr("toolkit.data.read.can_reach", lambda url: True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nor a data set that could be loaded from the hub"):
        read_table("nobody/no-such-data-set")
