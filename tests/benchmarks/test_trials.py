"""What a trial is checked by: digests, gates, order, its process."""

import os
import sys
import time
from itertools import chain
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from toolkit.benchmarks.arms import Arm, load_arm, load_arms, shipped_arms
from toolkit.benchmarks.gates import STATUSES, status_alone, status_beside
from toolkit.benchmarks.process import environment, run_process
from toolkit.benchmarks.runner import order
from toolkit.errors import ConfigError, InputError
from toolkit.trials.digest import RowDigest

ROWS = ([5, 6, 7, 8], [9, 10], [11, 12, 13])


def padded(rows, width=5):
    return {
        "input_ids": np.array([[*row, *[0] * (width - len(row))] for row in rows]),
        "labels": np.array([[-100, *row[1:], *[-100] * (width - len(row))] for row in rows]),
        "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def flat(rows, num_pads=0):
    return {
        "input_ids": np.array([[*chain(*rows), *[0] * num_pads]]),
        "labels": np.array([[*chain(*([-100, *row[1:]] for row in rows)), *[-100] * num_pads]]),
        "position_ids": np.array([[*chain(*(range(len(row)) for row in rows)), *[0] * num_pads]]),
    }


def digest(*batches):
    made = RowDigest()
    for batch in batches:
        made.add(batch)
    return made.as_dict()


def test_a_digest_does_not_depend_on_order_padding_or_layout():
    whole = digest(padded(ROWS))
    for other in (
        digest(padded(ROWS[:1]), padded(ROWS[:0:-1], width=7)),
        digest(flat(list(ROWS))),
        digest(flat(list(ROWS[1:]), num_pads=3), flat(list(ROWS[:1]))),
    ):
        assert {k: v for k, v in whole.items() if k != "num_padded_tokens"} == {
            k: v for k, v in other.items() if k != "num_padded_tokens"
        }
    assert (whole["num_rows"], whole["num_tokens"], whole["num_trainable_tokens"]) == (3, 9, 6)
    assert whole["num_padded_tokens"] == 15


@pytest.mark.parametrize(
    "other",
    [
        padded([[5, 6, 7, 9], *ROWS[1:]]),  # another token
        padded([*ROWS, ROWS[0]]),  # a row twice
        padded([[6, 5, 7, 8], *ROWS[1:]]),  # another order within a row
    ],
)
def test_a_digest_tells_other_rows(other):
    assert digest(other)["token_digest"] != digest(padded(ROWS))["token_digest"]


def test_a_digest_tells_other_masks():
    masked = padded(ROWS)
    masked["labels"][0, 2] = -100
    assert digest(masked)["token_digest"] == digest(padded(ROWS))["token_digest"]
    assert digest(masked)["label_digest"] != digest(padded(ROWS))["label_digest"]


def trial(**changes):
    facts = {
        "unsloth": False,
        "world_size": 1,
        "initial_loss": 3.0,
        "final_loss": 2.0,
        "num_tensors_moved": 4,
        "num_tensors_trained": 4,
        "num_trainable": 100,
    }
    return {
        "facts": facts | {k: v for k, v in changes.items() if k in facts},
        "losses": changes.get("losses", [3.0, 2.5]),
        "steps": [{}] * changes.get("num_steps", 5),
        "rows": {"token_digest": "a", "label_digest": "b", "num_tokens": 9} | changes.get("rows", {}),
    }


@pytest.mark.parametrize(
    ("changes", "options", "status"),
    [
        ({}, {}, "ok"),
        ({"unsloth": True}, {}, "fell_back"),
        ({}, {"backend": "unsloth"}, "fell_back"),
        ({"unsloth": True}, {"backend": "unsloth"}, "ok"),
        ({"world_size": 2}, {}, "world_size"),
        ({"losses": [float("nan")]}, {}, "not_finite"),
        ({"final_loss": "NaN"}, {}, "not_finite"),
        ({"num_tensors_moved": 0}, {}, "not_moved"),
        ({"num_steps": 3}, {}, "too_few_steps"),
    ],
)
def test_gates_of_a_trial_alone(changes, options, status):
    arm = Arm(name="a", options=options)
    found, reason = status_alone(arm, trial(**changes), num_processes=1, warmup_steps=3)
    assert found == status
    assert (reason == "") == (status == "ok")
    assert found in STATUSES


@pytest.mark.parametrize(
    ("changes", "may_differ", "status"),
    [
        ({}, [], "ok"),
        ({"num_trainable": 101}, [], "other_parameters"),
        ({"rows": {"token_digest": "x"}}, [], "other_tokens"),
        ({"rows": {"label_digest": "x"}}, [], "other_tokens"),
        ({"rows": {"label_digest": "x"}}, ["tokens"], "ok"),
        ({"initial_loss": 3.05}, [], "ok"),
        ({"initial_loss": 3.1}, [], "other_loss"),
        ({"initial_loss": 3.1}, ["loss"], "ok"),
    ],
)
def test_gates_of_a_trial_beside_the_reference(changes, may_differ, status):
    arm = Arm(name="a", may_differ=may_differ)
    found, _ = status_beside(arm, trial(**changes), trial(), loss_tolerance=0.02)
    assert found == status


def test_every_other_repeat_runs_backwards():
    arms = [Arm(name=name) for name in "abc"]
    names = [place.arm.name for place in order(arms, 4, seed=1)]
    repeats = [names[i : i + 3] for i in range(0, 12, 3)]
    assert repeats[0] == repeats[2] == repeats[1][::-1] == repeats[3][::-1]
    assert sorted(repeats[0]) == ["a", "b", "c"]
    assert len({tuple(p.arm.name for p in order(arms, 1, seed=s)) for s in range(20)}) > 1


def test_a_trial_inherits_nothing_that_steers_training(tmp_path, monkeypatch):
    for name in ("UNSLOTH_X", "TORCHINDUCTOR_X", "ACCELERATE_USE_CPU", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/models")
    variables = environment(tmp_path, {"MINE": "2"})
    assert not {"UNSLOTH_X", "TORCHINDUCTOR_X", "ACCELERATE_USE_CPU", "PYTHONSTARTUP"} & variables.keys()
    assert (variables["HF_HOME"], variables["MINE"]) == ("/models", "2")
    assert variables["TRITON_CACHE_DIR"].startswith(str(tmp_path))


@pytest.mark.faults
def test_a_trial_that_takes_too_long_is_ended_with_all_its_children(tmp_path):
    script = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    ended = run_process(
        [sys.executable, "-c", script], tmp_path / "log", dict(os.environ), timeout_seconds=2.0
    )
    assert ended.timed_out
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_memory_of_a_trial_is_that_of_all_its_processes(tmp_path):
    block = "import time; block = bytearray(80_000_000); time.sleep(1.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {block!r}])"
    ended = run_process([sys.executable, "-c", child], tmp_path / "log", dict(os.environ), timeout_seconds=60)
    assert ended.exit_status == 0
    assert ended.peak_tree_rss_bytes > 80_000_000


def test_shipped_arms_can_be_loaded():
    arms = load_arms(list(shipped_arms()))
    assert {"hf", "hf-plain", "unsloth", "trl", "trl-defaults", "transformers"} <= {arm.name for arm in arms}
    assert all(arm.about for arm in arms)
    assert load_arm("unsloth").backend == "unsloth"


def test_arms_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mine.yaml").write_text("program: mine.py\nenvironment: {A: 1}\n")
    arm = load_arm(str(tmp_path / "mine.yaml"))
    assert (arm.name, arm.program, arm.environment) == ("mine", str(tmp_path / "mine.py"), {"A": "1"})


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("programm: trl", ConfigError, "did you mean 'program'"),
        ("options: [1]", ConfigError, "options is a mapping"),
        ("may_differ: [speed]", ConfigError, "'speed' is none of"),
        ("program: nowhere.py", InputError, "there is no"),
        ("python: /nowhere/python", InputError, "no interpreter"),
    ],
)
def test_wrong_arms(tmp_path, text, error, said):
    (tmp_path / "arm.yaml").write_text(text + "\n")
    with pytest.raises(error, match=said):
        load_arm(str(tmp_path / "arm.yaml"))


def test_unknown_arms_and_arms_given_twice():
    with pytest.raises(InputError, match="did you mean 'unsloth'"):
        load_arm("unslot")
    with pytest.raises(InputError, match="there is no file"):
        load_arm("nowhere/arm.yaml")
    with pytest.raises(InputError, match="twice"):
        load_arms(["hf", "hf"])


def test_operations_of_a_token_count_frozen_weights_less():
    from toolkit.trials.flops import flops_per_token

    class Weight:
        def __init__(self, *shape, requires_grad):
            self.shape, self.requires_grad = shape, requires_grad

        def dim(self):
            return len(self.shape)

        def numel(self):
            return int(np.prod(self.shape))

    def model(requires_grad):
        embedding, norm = Weight(100, 8, requires_grad=False), Weight(8, requires_grad=True)
        matrix = Weight(8, 8, requires_grad=requires_grad)
        text = SimpleNamespace(num_attention_heads=2, hidden_size=8, num_hidden_layers=3)
        return SimpleNamespace(
            get_input_embeddings=lambda: SimpleNamespace(weight=embedding, parameters=lambda: [embedding]),
            get_output_embeddings=lambda: None,
            parameters=lambda: [embedding, matrix, norm],
            config=SimpleNamespace(get_text_config=lambda: text),
        )

    attention = 12 * 3 * 8 * 10 / 2
    assert flops_per_token(model(True), 10) == 6 * 64 + attention
    assert flops_per_token(model(False), 10) == 4 * 64 + attention
