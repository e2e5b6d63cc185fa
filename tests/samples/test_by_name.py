"""``sample:NAME`` in the place of a model or of data: made on first use, once."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit.cli.files import named_sources
from toolkit.cli.samples import check_samples, make_samples
from toolkit.config.recipes import IterativeConfig
from toolkit.data.read import open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import InputError, RunDirectoryError
from toolkit.modeling.source import find_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


def test_a_model_is_made_where_it_is_named(cache):
    source = find_model("sample:tiny-xlm-r")
    assert (source.name, source.is_local) == (str(cache / "models" / "tiny-xlm-r"), True)
    assert (cache / "models" / "tiny-xlm-r" / "model.safetensors").is_file()


def test_a_tokenizer_is_made_where_it_is_named(cache):
    config = SimpleNamespace(
        tokenizer="sample:tiny-xlm-r", model="m", revision=None, trust_remote_code=False, chat_template=None
    )
    assert load_tokenizer(config)("mirëdita")["input_ids"]


def test_data_of_one_locale_is_made_where_it_is_named(cache):
    source = open_source("sample:intents:sq-AL")
    assert list(source.splits) == ["train", "validation", "test"]
    assert {row["locale"] for row in source.table("validation").rows} == {"sq-AL"}
    assert [path.name for path in (cache / "data").iterdir()] == ["intents-sq-AL"]


def test_it_is_made_once_and_said_once(cache, capsys):
    config = IterativeConfig(locales=["sq-AL"], model="sample:tiny-xlm-r")
    make_samples(config)
    said = capsys.readouterr().err
    assert "Writing tiny-xlm-r ..." in said
    assert "sq-AL: 5,317 rows of 40 intents" in said
    weights = cache / "models" / "tiny-xlm-r" / "model.safetensors"
    before = weights.stat()
    make_samples(config)
    find_model("sample:tiny-xlm-r")
    assert capsys.readouterr().err == ""
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_sample_that_was_changed_is_not_used(cache):
    find_model("sample:tiny-xlm-r")
    (cache / "models" / "tiny-xlm-r" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"model\.safetensors is missing or was changed"):
        find_model("sample:tiny-xlm-r")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "sample:tiny-xlmr"},
            "there is no sample model named 'tiny-xlmr'; did you mean 'tiny-xlm-r'",
        ),
        ({"tokenizer": "sample:gpt"}, "there is no sample model named 'gpt'"),
        (
            {"data": "sample:intent:{locale}"},
            "there is no sample data set named 'intent'; did you mean 'intents'",
        ),
        ({"locales": ["am-ET"]}, "there is no locale named 'am-ET'"),
        ({"target_languages": ["am-ET"]}, "there is no locale named 'am-ET'"),
        ({"data": "sample:conversations:xx"}, "there is no language of conversations named 'xx'"),
        (
            {"data": "./{locale}", "eval_data": "sample:intent:{locale}"},
            "there is no sample data set named 'intent'",
        ),
    ],
)
def test_wrong_names_are_found_without_making_anything(options, message, cache):
    with pytest.raises(InputError, match=message):
        check_samples(IterativeConfig.model_validate({"locales": ["en-US"], **options}))
    assert not cache.exists()


def test_names_that_are_right_make_nothing_either(cache):
    check_samples(IterativeConfig(locales=["en-US", "sq-AL"]))
    assert not cache.exists()


def test_every_locale_has_its_source():
    config = IterativeConfig(locales=["en-US"], target_languages=["sq-AL"], eval_data="./{locale}.json")
    assert list(named_sources(config)) == [
        ("data", "sample:intents:en-US"),
        ("data", "sample:intents:sq-AL"),
        ("eval_data", "./en-US.json"),
        ("eval_data", "./sq-AL.json"),
        ("model", "sample:multilingual-e5-small"),
    ]
