"""What a user gets for wrong input: exit status 2, one message that says where and what to do, nothing left behind."""

import json
import shutil

import pytest


@pytest.fixture
def refused(train, tmp_path):
    """refused(options…) → the message; checks status, absence of a traceback and that no run was begun."""

    def check(*options, **keywords) -> str:
        run = train(*options, **keywords)
        assert run.status == 2, (run.status, run.out, run.err)
        assert "Traceback" not in run.err + run.out
        assert run.err.count("error:") == 1
        assert not (run.folder / "journal.jsonl").exists()
        assert not run.folder.exists()
        return run.err

    return check


def test_misspelt_key_and_wrong_type_together(refused, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: m\ndata: d\nlearnin_rate: 1e-4\nmax_epochs: many\n")
    message = refused("--config", config, defaults=False)
    assert "run.yaml:3" in message
    assert "learning_rate" in message
    assert "run.yaml:4" in message


def test_missing_file(refused, tmp_path, tiny_model):
    message = refused("--model", tiny_model, "--data", tmp_path / "none.jsonl", defaults=False)
    assert "none.jsonl" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ('{"text": "a"}\n{"text": "b"}\n{"text": \n', "3"),
        ('{"alpha": "a", "beta": "b"}\n', "alpha"),
        (
            '{"messages": [{"role": "user", "content": "only a question"}]}\n',
            "none of the 1 train rows is left",
        ),
    ],
    ids=["empty file", "broken line", "unknown format", "no answers"],
)
def test_wrong_data(refused, tmp_path, tiny_model, content, expected):
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    message = refused("--model", tiny_model, "--data", data, "--max-length", 64, defaults=False)
    assert "rows.jsonl" in message
    assert expected in message


def test_rows_longer_than_the_limit_are_named(refused):
    message = refused("--max-length", 40)
    assert "longer than --max-length 40" in message
    assert "--overlong" in message


def test_no_chat_template(refused, tmp_path, tiny_model, chat_data):
    model = tmp_path / "base"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refused("--model", model)
    assert "chat template" in message
    assert "--chat-template" in message


def test_a_sequence_longer_than_the_model(refused):
    assert "positions" in refused("--max-length", 4096)


def test_lora_targets_that_match_nothing(refused):
    message = refused("--lora-target-modules", "query,value")
    assert "query" in message
    assert "q_proj" in message


def test_a_model_that_does_not_exist(refused, tmp_path, chat_data):
    message = refused("--model", tmp_path / "nothing", "--data", chat_data["train"], defaults=False)
    assert str(tmp_path / "nothing") in message


def test_missing_packages(refused, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    hidden = {"bitsandbytes", "deepspeed"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if n in hidden else found(n, p))
    assert "bitsandbytes" in refused("--load-in-4bit")
    assert 'pip install "meldkit[deepspeed]"' in refused("--deepspeed", "zero2")


def test_a_learning_rate_schedule_that_does_not_exist(refused):
    message = refused("--lr-scheduler", "cosin")
    assert "--lr-scheduler: 'cosin' is not one of" in message
    assert "did you mean 'cosine'?" in message
    assert "reduce_lr_on_plateau" not in message  # what is refused is not offered


def test_too_many_duplicates(refused, train, tmp_path, chat_data):
    row = chat_data["train"].read_text().splitlines()[0]
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{row}\n" * 5)
    assert "--max-duplicates" in refused("--data", data)
    assert train("--data", data, "--max-duplicates", 1, "--max-steps", 1).status == 0


def test_output_folder_of_another_run(train):
    assert train("--max-steps", 1).status == 0
    second = train("--max-steps", 1)
    assert second.status == 2
    assert "holds another run" in second.err
    assert "--resume" in second.err
    changed = train("--max-steps", 2, "--resume")
    assert changed.status == 2
    assert "max_steps: 1 before, 2 now" in changed.err


def test_data_that_changed_between_kill_and_resume(train, tmp_path, chat_data):
    data = tmp_path / "rows.jsonl"
    shutil.copy(chat_data["train"], data)
    assert train("--data", data, "--max-steps", 2, "--checkpoint-every", 1).status == 0
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"finished"' not in line))
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[1:]))
    again = train("--data", data, "--max-steps", 2, "--checkpoint-every", 1, "--resume")
    assert again.status == 2
    assert "data fingerprint" in again.err


def test_a_loss_that_is_not_finite_ends_with_advice(train):
    run = train("--learning-rate", "1e30", "--max-grad-norm", 0, "--finetuning", "full", "--lora-r", 16)
    assert run.status == 1
    assert "Traceback" not in run.err
    assert "--learning-rate" in run.err
    assert "nan" in run.err or "inf" in run.err
