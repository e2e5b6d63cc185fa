"""What can only be a path is found missing before anything starts, by every part in the same way."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit.cli.files import missing_files
from toolkit.data.files import SUFFIXES
from toolkit.data.read import open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import DataError, ModelError
from toolkit.modeling.source import find_model
from toolkit.paths import can_only_be_a_path

PATHS = [
    "./gpt2",
    "/gpt2",
    "~/gpt2",
    "../x",
    "gpt2/",
    "a/b/c",
    "x.GGUF",
    "org/model.gguf",
    "notes.txt",
    "a\\b",
]
HUB_IDS = ["gpt2", "Qwen/Qwen3-8B-Base", "Qwen/Qwen2.5-0.5B", "bert-base-v1.1", "org/name:part"]


@pytest.mark.parametrize("source", [*PATHS, *(f"rows{suffix}" for suffix in SUFFIXES), "rows.ndjson"])
def test_a_missing_path_is_said_early(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert can_only_be_a_path(source)
    options = SimpleNamespace(data=source, model=source)
    assert missing_files(options) == [("data", source), ("model", source)]


@pytest.mark.parametrize("source", HUB_IDS)
def test_what_may_be_a_hub_id_is_not_missing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not can_only_be_a_path(source)
    assert missing_files(SimpleNamespace(data=source, model=source)) == []
    assert not find_model(source).is_local


@pytest.mark.parametrize("source", PATHS)
def test_data_models_and_tokenizers_say_that_a_path_is_not_there(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_source(source)
    with pytest.raises(ModelError, match="does not exist"):
        find_model(source)
    options = SimpleNamespace(
        model=source, tokenizer=None, revision=None, chat_template=None, trust_remote_code=False
    )
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(options)
