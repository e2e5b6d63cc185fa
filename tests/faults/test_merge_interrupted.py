"""Ctrl-C while ``meldkit merge`` runs: exit status 75, a command that goes on, and the same bytes from it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from toolkit.durable import STAGING_PREFIX

pytestmark = pytest.mark.faults
NUM_TENSORS, SIZE = 48, 400_000  # more than a second for the backend that is used


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Of a slow merge of two models."""
    generator = np.random.default_rng(0)
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"t{i}": generator.standard_normal(SIZE, np.float32) for i in range(NUM_TENSORS)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"architectures": ["ToyForCausalLM"]}')
    models = [str(tmp_path / name) for name in "ab"]
    slow = ["--backend", "reference", "--num-threads", "1"]
    return ["merge", "--method", "linear", "--models", *models, "--weights", "1", "2", *slow]


def start(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "toolkit", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_interrupted_then_resumed(arguments, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    process = start([*arguments, "--out", str(whole)])
    assert process.wait(120) == 0, process.communicate()
    process = start([*arguments, "--out", str(out)])
    while process.poll() is None and not list(tmp_path.glob(f"{STAGING_PREFIX}*/.progress.jsonl")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGINT: the merge was left unfinished" in errors
    assert not out.exists()
    hint = next(line for line in errors.splitlines() if line.startswith("  hint: "))
    program, *again = shlex.split(hint.removeprefix("  hint: "))
    assert (program, again) == ("meldkit", [*arguments, "--out", str(out), "--resume"])
    process = start(again)
    assert process.wait(120) == 0, process.communicate()
    assert weights(out) == weights(whole)
    assert json.loads((out / "merge_report.json").read_text())["resumed"] is True
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))
