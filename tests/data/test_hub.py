"""Data sets of the hub that are published as a script: their rows come from the hub's own conversion to parquet.

No hub is reached: the folder has the layout of the branch ``refs/convert/parquet``, and ``datasets`` reads it as it
would read that branch.
"""

import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from toolkit.data.read import open_source
from toolkit.errors import DataError

NAME = "AmazonScience/massive"


def convert(intent_data, branch, locales) -> None:
    """Write the branch: LOCALE/SPLIT/0000.parquet, whose metadata name the classes."""
    classes = datasets.ClassLabel(names=[f"intent_{number}" for number in range(3)])
    for locale in locales:
        for split in ("train", "validation", "test"):
            lines = (intent_data / locale / f"{split}.jsonl").read_text().splitlines()
            table = datasets.Dataset.from_list([json.loads(line) for line in lines])
            path = branch / locale / split / "0000.parquet"
            path.parent.mkdir(parents=True)
            table.cast_column("intent", classes).to_parquet(path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder of the branch; the data set itself is a script."""
    branch = tmp_path / "branch"
    load_dataset = datasets.load_dataset

    def load(name, configuration=None, *, revision=None, data_dir=None):
        assert name == NAME
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found massive.py")
        assert revision == "refs/convert/parquet"
        return load_dataset(str(branch), data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

    def list_repo_tree(self, name, *, repo_type, revision):
        assert (name, repo_type, revision) == (NAME, "dataset", "refs/convert/parquet")
        entries = [
            SimpleNamespace(path=".gitattributes"),
            *(
                huggingface_hub.hf_api.RepoFolder(path=path.name, oid="0")
                for path in sorted(branch.iterdir())
            ),
        ]
        return iter(entries)

    monkeypatch.setattr("toolkit.data.read.can_reach", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", list_repo_tree)
    return branch


def test_a_script_is_read_as_the_hub_converted_it(hub, intent_data):
    convert(intent_data, hub, ("en-US", "fr-FR"))
    source = open_source(f"{NAME}:fr-FR")
    assert set(source.splits) == {"train", "validation", "test"}
    rows = source.table("train").rows
    assert len(rows) == 24
    assert {row["intent"] for row in rows} == {"intent_0", "intent_1", "intent_2"}
    assert {row["locale"] for row in rows} == {"fr-FR"}


def test_the_only_configuration_need_not_be_named(hub, intent_data):
    convert(intent_data, hub, ("en-US",))
    assert {row["locale"] for row in open_source(NAME).table("test").rows} == {"en-US"}


def test_one_of_several_must_be_named(hub, intent_data):
    convert(intent_data, hub, ("en-US", "fr-FR"))
    with pytest.raises(DataError) as error:
        open_source(NAME)
    assert f"{NAME}:CONFIGURATION" in str(error.value)


def test_other_errors_are_errors(hub, monkeypatch):
    def load_dataset(name, configuration=None, **more):
        assert not more
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="the disk is full"):
        open_source(f"{NAME}:fr-FR")


def test_locales_train_on_it(hub, intent_data, tiny_encoder, tmp_path, capsys):
    from toolkit.cli.train import run_recipe

    convert(intent_data, hub, ("en-US", "fr-FR"))
    words = ["--locales", "en-US,fr-FR", "--data", f"{NAME}:{{locale}}", "--model", str(tiny_encoder)]
    words += ["--output-dir", str(tmp_path / "run"), "--cpu", "--max-epochs", "1", "--merge-frequency", "1"]
    words += ["--no-baselines"]
    assert run_recipe("iterative-merge", words) == 0, capsys.readouterr().err
    merged = json.loads((tmp_path / "run" / "merge_history.json").read_text())["merges"]
    assert [merge["participants"] for merge in merged] == [["en-US", "fr-FR"]]
