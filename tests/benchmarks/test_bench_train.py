"""meldkit bench train for real: trials of the tiny model in processes of their own, all arms on the same rows."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from toolkit.cli.main import main

SMALL = (
    "--max-length",
    "160",
    "--max-rows",
    "12",
    "--batch-size",
    "4",
    "--lora-r",
    "4",
    "--warmup-steps",
    "2",
)


def words(model, data, out, *options):
    source = ["--model", str(model), "--data", str(data["train"]), "--eval-data", str(data["valid"])]
    return ["bench", "train", *source, *SMALL, "--cpu", "--out", str(out), *options]


@pytest.fixture(scope="module")
def compared(tiny_model, chat_data, tmp_path_factory):
    """One trial of each arm; the folder of the results."""
    out = tmp_path_factory.mktemp("bench") / "out"
    argv = words(
        tiny_model, chat_data, out, "--arms", "hf,hf-plain,trl,transformers,unsloth", "--repeats", "1"
    )
    assert main(argv) == 0
    return out


def test_all_arms_train_the_same_rows_from_the_same_loss(compared):
    result = json.loads((compared / "benchmark.json").read_text())
    trials = {trial["arm"]: trial for trial in result["trials"]}
    assert [entry["statuses"] for entry in result["arms"]] == [["ok"]] * 5
    assert len({(t["rows"]["token_digest"], t["rows"]["label_digest"]) for t in trials.values()}) == 1
    assert all(t["rows"]["num_rows"] == 24 for t in trials.values())  # twelve rows, two passes
    losses = [t["facts"]["initial_loss"] for t in trials.values()]
    assert max(losses) - min(losses) < 0.01
    assert all(t["facts"]["final_loss"] < t["facts"]["initial_loss"] for t in trials.values())
    assert trials["unsloth"]["facts"]["unsloth"]
    assert not trials["hf"]["facts"]["unsloth"]


def test_a_result_says_what_was_measured_and_on_what(compared):
    result = json.loads((compared / "benchmark.json").read_text())
    assert {"torch", "transformers"} <= result["environment"]["versions"].keys()
    assert result["workload"]["facts"]["num_rows"] == 12
    entry = result["arms"][1]
    assert entry["measured"]["num_steps_counted"] == 4  # six steps, two of them warm-up
    assert entry["measured"]["peak_rss_bytes"] > 1e8
    assert entry["measured"]["mfu"] is None  # nobody knows a CPU's peak
    assert entry["ratios"]["trainable_tokens"]["verdict"] == "one trial"
    report = (compared / "report.md").read_text()
    assert "| hf-plain |" in report
    assert "Measured with:" in report


def test_plots_are_written(compared):
    pytest.importorskip("matplotlib")
    assert (compared / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (compared / "memory.svg").read_text()


def test_a_trial_that_is_done_is_kept(compared, tiny_model, chat_data, capsys):
    arms = ("--arms", "hf,hf-plain,trl,transformers,unsloth", "--repeats", "1")
    kept = {path: path.stat().st_mtime_ns for path in (compared / "trials").glob("*.json")}
    assert main(words(tiny_model, chat_data, compared, *arms)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(words(tiny_model, chat_data, compared, *arms, "--resume", "--peak-tflops", "1")) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (compared / "trials").glob("*.json")}
    assert json.loads((compared / "benchmark.json").read_text())["arms"][0]["measured"]["mfu"] > 0
    assert main(words(tiny_model, chat_data, compared, *arms, "--resume", "--seed", "7")) == 2
    assert "another workload" in capsys.readouterr().err


def test_a_script_of_ones_own_is_measured_and_gated(tiny_model, chat_data, tmp_path):
    """One that trains as the others do, one that claims to be Unsloth, one that fails, one that trains other rows."""
    (tmp_path / "mine.py").write_text(
        "from toolkit.trials.probe import Probe\n"
        "from toolkit.trials.equal_settings import EqualSettings\n"
        "probe = Probe.from_arguments(); settings = EqualSettings(probe.spec)\n"
        "from trl import SFTConfig, SFTTrainer\n"
        "import os\n"
        "args = settings.training_arguments() | {'max_length': 160}\n"
        "rows = settings.rows()\n"
        "rows = rows.select(range(8)) if os.environ.get('FEWER') else rows\n"
        "trainer = SFTTrainer(settings.model_path(), args=SFTConfig(**args), train_dataset=rows,\n"
        "    peft_config=settings.peft_config())\n"
        "probe.attach(trainer); trainer.train(); probe.finish()\n"
    )
    (tmp_path / "mine.yaml").write_text("program: mine.py\n")
    (tmp_path / "claims.yaml").write_text("program: mine.py\noptions: {backend: unsloth}\n")
    (tmp_path / "fewer.yaml").write_text("program: mine.py\nenvironment: {FEWER: '1'}\n")
    (tmp_path / "fails.py").write_text("raise MemoryError('all gone')\n")
    (tmp_path / "fails.yaml").write_text("program: fails.py\n")
    arms = ",".join(str(tmp_path / f"{name}.yaml") for name in ("mine", "claims", "fewer", "fails"))
    out = tmp_path / "out"
    assert main(words(tiny_model, chat_data, out, "--arms", arms, "--repeats", "1", "--max-epochs", "2")) == 1
    entries = {e["arm"]["name"]: e for e in json.loads((out / "benchmark.json").read_text())["arms"]}
    statuses = {name: entry["statuses"] for name, entry in entries.items()}
    assert statuses == {"mine": ["ok"], "claims": ["fell_back"], "fewer": ["other_tokens"], "fails": ["oom"]}
    assert [name for name, entry in entries.items() if entry["measured"]] == ["mine"]
    assert "fell_back (another backend trained" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--arms", "nothing"), "unknown arm"),
        (("--max-epochs", "1.5"), "whole number"),
        (("--backend", "unsloth"), "decided by each arm"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_wrong_input_is_told_before_any_trial(tiny_model, tmp_path, capsys, options, said):
    argv = ["bench", "train", "--model", str(tiny_model), "--out", str(tmp_path / "out"), "--cpu", *options]
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_no_process_and_can_go_on(tiny_model, chat_data, tmp_path, number):
    out = tmp_path / "out"
    argv = words(tiny_model, chat_data, out, "--arms", "hf-plain", "--repeats", "1")
    process = subprocess.Popen([sys.executable, "-m", "toolkit", *argv], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (out / "trials" / "00-hf-plain.log").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait(120) == 75
    assert "--resume" in process.stderr.read()
    assert not _trials_of(out)


def _trials_of(out):
    import psutil

    return [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(out / "trials")]
