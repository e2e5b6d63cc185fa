"""The gate between two results: it catches a slowdown of 20 %, and lets identical code pass."""

import copy
import json

import numpy as np
import pytest

from toolkit.benchmarks.arms import Arm
from toolkit.benchmarks.commands import bench
from toolkit.benchmarks.compare import share
from toolkit.benchmarks.summary import summarise
from toolkit.errors import InputError

WARMUP = 2


FACTS = {
    "initial_loss": 3.0,
    "final_loss": 2.0,
    "load_seconds": 1.0,
    "whole_seconds": 9.0,
    "peak_allocated_bytes": None,
    "peak_reserved_bytes": None,
    "peak_process_gpu_bytes": None,
    "flops_per_token": 1e6,
    "world_size": 1,
    "device": "cpu",
    "num_trainable": 10,
    "num_threads": 2,
    **dict.fromkeys(("trainer", "model", "precision", "optim"), "x"),
    "dtypes": ["float32"],
    "gradient_checkpointing": False,
}


def result(*, seed, slowdown=0.0, memory=1e9, repeats=6):
    """A result as bench train writes it: trials with noise of their own (3 %) and of each step (5 %)."""
    generator = np.random.default_rng(seed)
    trials = []
    for repeat in range(repeats):
        own = (1 + slowdown) * np.exp(0.03 * generator.standard_normal())
        seconds = own * np.exp(0.05 * generator.standard_normal(12))
        counts = {"num_tokens": 100, "num_trainable_tokens": 90, "num_rows": 4}
        facts = FACTS | {"peak_rss_bytes": memory, "load_peak_rss_bytes": memory}
        trials.append(
            {
                "arm": "hf",
                "repeat": repeat,
                "status": "ok",
                "reason": "",
                "steps": [counts | {"seconds": float(s)} for s in seconds],
                "rows": {"num_tokens": 80, "num_padded_tokens": 100},
                "facts": facts,
            }
        )
    return {
        "schema": 1,
        "kind": "train",
        "warmup_steps": WARMUP,
        "environment": {
            "cpu": {"model": "EPYC", "usable_cores": 2},
            "gpus": [],
            "memory_bytes": 24e9,
        },
        "workload": {
            "settings": {"batch_size": 4},
            "facts": {"data_fingerprint": "d", "model_fingerprint": "m"},
        },
        "arms": summarise([Arm(name="hf")], trials, warmup_steps=WARMUP, gpus=[], peak_tflops=None),
        "trials": trials,
    }


@pytest.fixture
def compare(tmp_path, capsys):
    def run(old, new, *options):
        for name, content in (("old", old), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return bench(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])

    return run


def test_identical_code_passes_twenty_of_twenty(compare):
    assert [compare(result(seed=2 * s), result(seed=2 * s + 1)) for s in range(20)] == [0] * 20


def test_a_slowdown_of_a_fifth_is_caught(compare, capsys):
    caught = [compare(result(seed=2 * s), result(seed=2 * s + 1, slowdown=0.2)) for s in range(20)]
    assert sum(caught) >= 18
    assert "more than 5.0%" in capsys.readouterr().out


def test_limits_are_in_effect(compare):
    old, new = result(seed=1), result(seed=2, slowdown=0.2, memory=1.02e9)
    assert compare(old, new, "--max-slowdown", "0.5") == 0
    assert compare(old, new, "--max-slowdown", "50%", "--max-mem", "1%") == 1


def test_memory_alone_is_enough(compare, capsys):
    assert compare(result(seed=1), result(seed=1, memory=1.05e9)) == 1
    assert "+5.0% memory, more than 3.0%" in capsys.readouterr().out


def test_an_arm_that_fails_now_is_a_regression(compare, capsys):
    new = result(seed=2)
    new["arms"][0] |= {"measured": None, "statuses": ["oom", "ok"]}
    assert compare(result(seed=1), new) == 1
    assert "measured before, and now: oom" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda new: new["environment"]["cpu"].update(model="Xeon"),
        lambda new: new["environment"]["gpus"].append({"name": "H200"}),
        lambda new: new["workload"]["settings"].update(batch_size=8),
        lambda new: new["workload"]["facts"].update(data_fingerprint="other"),
        lambda new: new.update(warmup_steps=1),
    ],
    ids=["cpu", "gpu", "settings", "data", "warm-up"],
)
def test_what_does_not_compare_is_refused_without_force(compare, change):
    new = copy.deepcopy(result(seed=2))
    change(new)
    with pytest.raises(InputError, match="do not compare"):
        compare(result(seed=1), new)
    assert compare(result(seed=1), new, "--force") == 0


def test_files_of_another_version_are_refused(compare, tmp_path):
    with pytest.raises(InputError, match="schema"):
        compare(result(seed=1), result(seed=1) | {"schema": 99})
    with pytest.raises(InputError, match="No such file"):
        bench(["compare", str(tmp_path / "nothing.json"), str(tmp_path / "nothing.json")])


def test_shares():
    assert (share("5%", "x"), share("0.05", "x"), share("0%", "x")) == (0.05, 0.05, 0.0)
    for text in ("five", "-1%", "nan", "2000%"):
        with pytest.raises(InputError, match="not a share"):
            share(text, "--max-mem")
