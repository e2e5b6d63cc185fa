"""Participants spread over two ranks: the bits of one process, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

THREE = ("--locales", "en-US,fr-FR,de-DE")
CASES = {
    "linear": (*THREE, "--lora-dropout", 0.1, "--optimizer-on-merge", "merge", "--baselines"),
    "ties": (*THREE, "--finetuning", "full", "--learning-rate", "3e-3", "--merge-algorithm", "ties"),
    "fisher": (
        *THREE,
        "--merge-algorithm",
        "fisher_dataset",
        "--num-fisher-examples",
        12,
        "--merge-scope",
        "each",
    ),
    "gate": (
        *THREE,
        "--merge-gate",
        "--merge-scope",
        "each",
        "--validate-merge-integrity",
        "--checkpoint-before-merge",
    ),
}


@pytest.fixture
def launch(tmp_path, iterative_defaults):
    """launch("--merge-scope", "each") → the process of a run on two ranks in tmp_path/ranks."""
    config = tmp_path / "defaults.json"
    config.write_text(json.dumps(iterative_defaults))

    def start(*options: object) -> subprocess.Popen[str]:
        argv = [
            "--config",
            config,
            "--output-dir",
            tmp_path / "ranks",
            "--num-processes",
            2,
            "--cpu",
            *options,
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "toolkit", "train", "iterative-merge", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
            start_new_session=True,
        )

    return start


@pytest.fixture
def alone(iterated, monkeypatch):
    """alone("--merge-scope", "each") → the run in this process, with as many threads as a rank: sums depend on it."""

    def run(*options: object):
        num_threads = torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        try:
            return iterated(
                "--num-processes", 1, *options
            )  # not a run that another test made with more threads
        finally:
            torch.set_num_threads(num_threads)

    return run


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def outcomes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("comparison/**/*.npz"))
    }


def assert_same(ranks, alone, locales=("en-US", "fr-FR", "de-DE")) -> None:
    assert ranks.weights == alone.weights
    for locale in locales:
        assert ranks.losses(locale) == alone.losses(locale)
    assert outcomes(ranks.folder) == outcomes(alone.folder)
    keys = ("epoch", "status", "participants", "weights", "gate", "before", "after", "attempts")
    assert [[m[key] for key in keys] for m in ranks.merges] == [
        [m[key] for key in keys] for m in alone.merges
    ]
    assert (
        ranks.read("final_statistics.json")["comparison"] == alone.read("final_statistics.json")["comparison"]
    )
    assert (
        ranks.read("final_statistics.json")["total_steps"]
        == alone.read("final_statistics.json")["total_steps"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_are_one_process(launch, alone, tmp_path, name):
    finish(launch(*CASES[name]))
    expected = alone(*CASES[name])
    assert_same(type(expected)(0, "", "", tmp_path / "ranks"), expected)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("num_events", [9, 14, 25])
def test_a_killed_run_on_two_ranks_goes_on(launch, alone, tmp_path, num_events):
    """Killed with all its processes once the journal has so many lines."""
    options = CASES["linear"]
    process = launch(*options)
    journal = tmp_path / "ranks" / "journal.jsonl"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= num_events:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() != 0, process.communicate()
    finish(launch(*options, "--resume"))
    expected = alone(*options)
    assert_same(type(expected)(0, "", "", tmp_path / "ranks"), expected)


def kill_rank_1(process: subprocess.Popen[str], folder: Path, *, num_commits: int) -> None:
    """Kill the second rank while it trains fr-FR, once the run has so many commits."""
    journal = folder / "ranks" / "journal.jsonl"
    while process.poll() is None:
        tasks = [path.read_text() for path in folder.glob("meldkit-launch-*/task-1.txt")]
        lines = journal.read_text().splitlines() if journal.exists() else []
        if tasks == ["fr-FR"] and sum('"event": "loop"' in line for line in lines) >= num_commits:
            ranks = psutil.Process(process.pid).children(recursive=True)
            [rank] = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
            rank.kill()
            return
        time.sleep(0.002)


@pytest.mark.faults
def test_a_killed_rank_is_recovered_once(launch, alone, tmp_path):
    options = (*CASES["linear"], "--enable-auto-recovery")
    process = launch(*options)
    kill_rank_1(process, tmp_path, num_commits=1)
    output = finish(process)
    assert "was killed by SIGKILL while it worked on fr-FR" in output
    assert "the run goes on from its last commit\n" in output
    expected = alone(*CASES["linear"])
    ranks = type(expected)(0, "", "", tmp_path / "ranks")
    assert_same(ranks, expected)
    [alert] = [a for a in ranks.read("training_alerts.json")["alerts"] if a["kind"] == "participant_failed"]
    assert alert["participant"] == "fr-FR"
    assert "goes on from its last checkpoint" in alert["message"]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("num_commits", [0, 1])
def test_the_locale_of_a_killed_rank_is_left_out(launch, alone, tmp_path, num_commits):
    process = launch(*CASES["gate"])
    kill_rank_1(process, tmp_path, num_commits=num_commits)
    output = finish(process)
    assert "the run goes on from its last commit, without fr-FR" in output
    ranks = type(alone(*CASES["gate"]))(0, "", "", tmp_path / "ranks")
    assert "fr-FR failed" in output
    assert set(ranks.merges[-1]["participants"]) == {"en-US", "de-DE"}
    assert (ranks.folder / "de-DE" / "final_model").is_dir()
    assert not (ranks.folder / "fr-FR" / "final_model").exists()
    compared = ranks.read("final_statistics.json")["comparison"]["participants"]
    assert "iterative" in compared["de-DE"]["arms"]


@pytest.mark.slow
def test_interrupted_on_two_ranks(launch, alone, tmp_path):
    options = CASES["linear"]
    process = launch(*options)
    journal = tmp_path / "ranks" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and b'"step": 2' in journal.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    finish(launch(*options, "--resume"))
    expected = alone(*options)
    assert_same(type(expected)(0, "", "", tmp_path / "ranks"), expected)


def test_more_ranks_than_locales_is_refused(iterate, tmp_path):
    run = iterate(tmp_path / "run", "--num-processes", 3)
    assert run.status == 2
    assert "3 is more than there are locales (2)" in run.err
