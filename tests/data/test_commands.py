"""The commands: what they print and the exit status that the user gets."""

import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import toolkit.data.read
from toolkit.cli.main import main
from toolkit.data.check import Lengths, digest, percent
from toolkit.data.encode import Encoded
from toolkit.data.show import bar, row_text


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path):
    """A folder with a tokenizer and nothing else."""
    tokenizer.save_pretrained(tmp_path / "tok")
    return str(tmp_path / "tok")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(write_jsonl, make_chat):
    return write_jsonl([make_chat(f"question {n}", "word " * (n + 1)) for n in range(20)])


def test_check_of_good_data(data, tokenizer_folder, capsys):
    assert (
        main(["data", "check", "--data", data, "--tokenizer", tokenizer_folder, "--eval-fraction", "0.2"])
        == 0
    )
    text = capsys.readouterr().out
    for part in ("messages", "trained tokens", "Lengths of the held-out rows in tokens", "█", "no problems"):
        assert part in text


def test_check_reports_every_problem_and_exits_with_2(write_jsonl, make_chat, tokenizer_folder, capsys):
    rows = write_jsonl([*[make_chat("same", "same")] * 9, make_chat("x", "word " * 90), make_chat("y", "")])
    leak = write_jsonl([make_chat("same", "same")], "eval.jsonl")
    argv = [
        "data",
        "check",
        "--data",
        rows,
        "--eval-data",
        leak,
        "--tokenizer",
        tokenizer_folder,
        "--max-length",
        "64",
    ]
    assert main(argv) == 2
    text = capsys.readouterr().out
    assert "problem: train: 1 rows are longer than --max-length 64, and --overlong is error" in text
    assert "problem: 8 of 11 training rows repeat an earlier row" in text
    assert "problem: 1 of 1 held-out rows are in the training data too" in text
    assert "warning: train: empty answers, not trained: 1" in text
    assert main([*argv, "--skip-data-check"]) == 0


def test_check_as_json(data, tokenizer_folder, capsys):
    assert main(["data", "check", "--data", data, "--tokenizer", tokenizer_folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["num_rows"] == 20
    assert report["train"]["lengths"]["unit"] == "tokens"
    assert report["problems"] == []


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_check_reads_each_source_once(
    data, write_jsonl, make_chat, tokenizer_folder, monkeypatch, with_tokenizer
):
    opened = []

    def read(path):
        opened.append(path.name)
        return real(path)

    real = toolkit.data.read.read_file
    monkeypatch.setattr(toolkit.data.read, "read_file", read)
    held_out = write_jsonl([make_chat("other", "answer")], "held_out.jsonl")
    argv = ["data", "check", "--data", data, "--eval-data", held_out]
    assert main(argv + ["--tokenizer", tokenizer_folder] * with_tokenizer) == 0
    assert opened == ["data.jsonl", "held_out.jsonl"]


def test_check_without_a_tokenizer_counts_characters(data, capsys):
    assert main(["data", "check", "--data", data]) == 0
    assert "in characters" in capsys.readouterr().out


def test_check_without_a_tokenizer_needs_neither_torch_nor_transformers(data):
    code = (
        "import sys; from toolkit.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(status or (9 if heavy "
        "else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", "--data", data], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_of_labelled_rows(write_jsonl, tokenizer_folder, capsys):
    rows = [{"utt": f"say {n}", "intent": "often" if n else "rare"} for n in range(30)]
    argv = ["data", "check", "--data", write_jsonl(rows), "--tokenizer", tokenizer_folder]
    assert main(argv) == 2, "as training does without --task"
    assert "use --task sequence-classification" in capsys.readouterr().err
    assert main([*argv, "--task", "sequence-classification"]) == 0
    text = capsys.readouterr().out
    assert "sequence-classification" in text
    assert "the commonest label has 29 rows and the rarest 1" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--dta", "x"], "--dta"),
        (["--data", "DATA", "--tokenizer", "./nowhere"], "./nowhere does not exist"),
        (["--data", "DATA", "--chat-template", "x.jinja"], "--chat-template needs a tokenizer"),
        (
            ["--data", "DATA", "--tokenizer", "TOK", "--chat-template", "nowhere.jinja"],
            "chat template nowhere.jinja cannot be read",
        ),
    ],
)
def test_wrong_input_is_one_message_and_2(argv, message, data, tokenizer_folder, capsys):
    argv = [{"DATA": data, "TOK": tokenizer_folder}.get(word, word) for word in argv]
    assert main(["data", "check", *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_preview_puts_trained_tokens_in_brackets(data, tokenizer_folder, capsys):
    assert (
        main(
            [
                "data",
                "preview",
                "--data",
                data,
                "--tokenizer",
                tokenizer_folder,
                "--num-rows",
                "1",
                "--first-row",
                "3",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "data.jsonl:3: " in text
    assert "<|im_start|>assistant\n⟦word word word <|im_end|>⟧" in text
    assert (
        main(["data", "preview", "--data", data, "--tokenizer", tokenizer_folder, "--first-row", "99"]) == 2
    )
    assert main(["data", "preview", "--data", data]) == 2


def test_preview_in_colour_marks_what_is_trained_special_and_cut(tokenizer):
    ids = tokenizer("<|im_start|>Hello<|im_end|>").input_ids
    trained = np.asarray([False] * (len(ids) - 1) + [True])
    row = Encoded(np.asarray(ids, dtype=np.int32), trained, 0)
    text = row_text(row, tokenizer, has_colour=True, max_length=len(ids) - 1)
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(text)
    assert text.plain == "<|im_start|>Hello✂<|im_end|>"
    assert "\x1b[36m<|im_start|>" in capture.get()
    assert "\x1b[1;9;32m<|im_end|>" in capture.get()
    assert row_text(row, tokenizer, has_colour=False, max_length=99).plain == "<|im_start|>Hello⟦<|im_end|>⟧"


def test_preview_keeps_characters_of_several_tokens_whole(tokenizer):
    ids = tokenizer("漢é").input_ids
    row = Encoded(np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool), 0)
    assert row_text(row, tokenizer, has_colour=False, max_length=99).plain == "漢é"


def test_split_and_formats(data, tmp_path, capsys):
    assert (
        main(["data", "split", "--data", data, "--out", str(tmp_path / "o"), "--fractions", "0.5,0.5"]) == 0
    )
    assert "10 rows (50.0 %)" in capsys.readouterr().out
    assert (
        main(["data", "split", "--data", data, "--out", str(tmp_path / "o"), "--fractions", "0.5,0.5"]) == 2
    )
    assert main(["data", "formats"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("messages", "sharegpt", "alpaca", "feedback", "massive"))


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_label_that_nobody_reads_is_a_warning(write_jsonl, tokenizer_folder, capsys, with_tokenizer):
    argv = ["data", "check", "--data", write_jsonl([{"text": f"say {n}", "label": n % 2} for n in range(9)])]
    argv += ["--tokenizer", tokenizer_folder] * with_tokenizer
    warning = "the column 'label' is not used with --task causal-lm"
    for _ in range(2):  # the second time with a tokenizer from the cache
        assert main(argv) == 0
        assert warning in " ".join(capsys.readouterr().out.split())
    assert main([*argv, "--task", "sequence-classification"]) == 0
    assert "not used" not in capsys.readouterr().out


def test_the_report_says_which_locales_were_joined(write_jsonl, tmp_path, capsys):
    for locale in ("en-US", "sq-AL"):
        write_jsonl([{"text": f"{locale} {n}"} for n in range(3)], f"many/{locale}/train.jsonl")
    assert main(["data", "check", "--data", str(tmp_path / "many"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert main(["data", "check", "--data", str(tmp_path / "many")]) == 0
    assert "note: " in capsys.readouterr().out
    assert f"{tmp_path / 'many'} [train] joins the locales en-US, sq-AL" in notes
    assert main(["data", "check", "--data", str(tmp_path / "many"), "--locale", "sq-AL", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["num_rows"] == 3
    assert not any("joins" in note for note in report["notes"])


@pytest.mark.parametrize("command", ["check", "preview", "split"])
@pytest.mark.parametrize("flag", ["--dry-run", "--print-config", "--save-config"])
def test_flags_of_training_are_refused(command, flag, data, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "parts")] if command == "split" else []
    assert main(["data", command, "--data", data, *argv, flag]) == 2
    assert f"{flag} is a flag of meldkit train" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("command", ["check", "preview", "split"])
def test_a_command_alone_prints_its_usage_and_exits_with_2(command, capsys):
    assert main(["data", command]) == 2
    assert f"meldkit data {command} --data DATA" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("check", "--length-grouping"),
        *(
            ("preview", flag)
            for flag in (
                "--overlong=drop",
                "--packing",
                "--length-grouping",
                "--skip-data-check",
                "--max-leaks=0.5",
                "--data-cache=x",
            )
        ),
    ],
)
def test_options_without_effect_are_unknown(command, flag, data, tokenizer_folder, capsys):
    assert main(["data", command, "--data", data, "--tokenizer", tokenizer_folder, flag]) == 2
    assert f"{flag.split('=')[0]}: unknown option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--valid-fraction", "0.2"], "--valid-fraction: does nothing without clients"),
        (["--clients", "2", "--fractions", "0.5,0.5"], "--fractions: excludes clients"),
    ],
)
def test_split_options_that_exclude_each_other(argv, message, data, tmp_path, capsys):
    assert main(["data", "split", "--data", data, "--out", str(tmp_path / "parts"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("command", ["check", "preview", "split"])
def test_help_lists_the_options(command, capsys):
    assert main(["data", command, "--help"]) == 0
    assert "--data TEXT" in capsys.readouterr().out


def test_bars_and_shares():
    assert bar(1.0, 4) == "████"
    assert bar(0.0, 4) == ""
    assert bar(0.0001, 4) == "▏"
    assert [percent(share) for share in (0, 0.00001, 0.005, 0.5)] == ["0 %", "< 0.01 %", "0.50 %", "50.0 %"]


def test_lengths_count_every_row():
    lengths = Lengths.of([1, 1, 2, 5, 100], "tokens")
    assert sum(lengths.bin_counts) == 5
    assert lengths.bin_edges[-1] > 100
    assert lengths.quantiles["p50"] == 2
    assert Lengths.of([7], "tokens").bin_counts == [1]


def test_digests_ignore_case_and_white_space():
    assert digest("Hello  World\n") == digest("hello world") != digest("helloworld")
