"""Participants spread over two ranks: the bits of one process, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    return start


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
def test_two_ranks_are_one_process(launch, iterated, tmp_path, name):
    finish(launch(*CASES[name]))
    alone = iterated(*CASES[name])
    assert_same(type(alone)(0, "", "", tmp_path / "ranks"), alone)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("num_events", [9, 14, 25])
def test_a_killed_run_on_two_ranks_goes_on(launch, iterated, tmp_path, num_events):
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
    alone = iterated(*options)
    assert_same(type(alone)(0, "", "", tmp_path / "ranks"), alone)


@pytest.mark.slow
def test_interrupted_on_two_ranks(launch, iterated, tmp_path):
    options = CASES["linear"]
    process = launch(*options)
    journal = tmp_path / "ranks" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and b'"step": 2' in journal.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    finish(launch(*options, "--resume"))
    alone = iterated(*options)
    assert_same(type(alone)(0, "", "", tmp_path / "ranks"), alone)


def test_more_ranks_than_locales_is_refused(iterate, tmp_path):
    run = iterate(tmp_path / "run", "--num-processes", 3)
    assert run.status == 2
    assert "3 is more than there are locales (2)" in run.err
