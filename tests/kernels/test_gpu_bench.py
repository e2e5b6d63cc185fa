"""What bench/gpu_kernels.py calls reached."""

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RULE = "weighted sum"


@pytest.fixture
def is_reached(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_kernels").is_reached


def result(
    ours: float, percent: float, *, failed: tuple[str, ...] = (), same: bool = True, **others: float
) -> dict:
    arms = {name.replace("_", " "): {"median_milliseconds": time} for name, time in others.items()}
    arms["meldkit"] = {"median_milliseconds": ours, "percent_of_copy": percent}
    return {"same_bits_as_cpu": same, "arms": arms, "failed": dict.fromkeys(failed, "no compiler")}


def test_the_goal_is_reached_ahead_of_all_of_torch(is_reached) -> None:
    assert is_reached(RULE, result(1.0, 90, torch_eager=2.0, torch_compile=1.5)) is True
    assert is_reached("ties", result(1.0, 20)) is True  # torch has nothing to compare it with


def test_the_goal_is_missed_whatever_did_not_run(is_reached) -> None:
    failed = ("torch compile",)
    assert is_reached(RULE, result(1.0, 80, torch_eager=2.0, failed=failed)) is False
    assert is_reached(RULE, result(1.0, 90, torch_eager=0.9, failed=failed)) is False
    assert is_reached(RULE, result(1.0, 90, torch_eager=2.0, failed=failed, same=False)) is False


def test_an_arm_of_torch_that_did_not_run_is_not_beaten(is_reached) -> None:
    assert is_reached(RULE, result(1.0, 90, torch_eager=2.0, failed=("torch compile",))) is None
    assert is_reached(RULE, result(1.0, 90)) is None
    assert is_reached(RULE, result(1.0, 90, torch_eager=2.0, failed=("meldkit, kernel alone",))) is True
