"""Real processes under the launcher: their world, exit status and output, signals and sudden deaths."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.config.options import LaunchOptions
from toolkit.launch import launcher, status
from toolkit.launch.ending import KilledRank
from toolkit.launch.plan import LaunchPlan, resolve_plan
from toolkit.launch.world import PARENT_VARIABLE

WAIT_SECONDS = 120  # a bound for a broken launcher, not a time that is expected


@pytest.fixture
def two_processes() -> LaunchPlan:
    return resolve_plan(LaunchOptions(num_processes=2, cpu=True), {"OMP_NUM_THREADS": "1"})


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "start_probe", "2", "rank_probe", *arguments]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_ready(folder: Path) -> list[int]:
    """Process ids of both ranks, once their handlers are installed."""
    paths = [folder / "ready-0", folder / "ready-1"]
    until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


def test_every_value_is_passed_to_accelerate(two_processes: LaunchPlan) -> None:
    command = launcher.command(two_processes, ["toolkit", "train", "centralized-hf", "--max-epochs", "1"])
    assert command[:2] == ["accelerate", "launch"]
    for flag, value in {
        "--num_processes": "2",
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--main_process_port": "0",
    }.items():
        assert command[command.index(flag) + 1] == value
    assert "--multi_gpu" in command
    assert "--cpu" not in command  # with it accelerate starts one process
    assert command[-6:] == ["-m", "toolkit", "train", "centralized-hf", "--max-epochs", "1"]
    assert "ACCELERATE_USE_CPU=true" in launcher.shell_line(two_processes, ["toolkit"])


def test_deepspeed_never_meets_use_cpu() -> None:
    plan = resolve_plan(LaunchOptions(num_processes=2, cpu=True, deepspeed="zero3"), {})
    line = launcher.shell_line(plan, ["toolkit"])
    assert "--use_deepspeed --zero_stage 3" in line
    assert "--multi_gpu" not in line
    assert "DS_ACCELERATOR=cpu" in line
    assert "ACCELERATE_USE_CPU" not in line


def test_two_processes_are_two_processes(
    two_processes: LaunchPlan, probe_environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.run(two_processes, ["rank_probe", "all_reduce"], probe_environment) == 0
    output = capfd.readouterr()
    assert "rank 0 of 2: sum 3" in output.out
    assert "rank 1" not in output.out


@pytest.mark.parametrize(
    ("exit_statuses", "expected"),
    [("00", 0), ("22", 2), ("05", 5)],
    ids=["done", "wrong input", "rank 1 fails"],
)
def test_the_exit_status_is_that_of_the_run(
    two_processes: LaunchPlan,
    probe_environment: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    exit_statuses: str,
    expected: int,
) -> None:
    assert (
        launcher.run(two_processes, ["rank_probe", "end_with", *exit_statuses], probe_environment) == expected
    )
    output = capfd.readouterr()
    if expected != 5:  # else rank 0 may have been stopped before it said anything
        assert "output of rank 0" in output.out
        assert "error of rank 0" in output.err
    assert ("error of rank 1" in output.err) == (expected == 5)
    if expected == 5:
        assert "meldkit: rank 1 failed with exit status 5; the end of its output:" in output.err
    for words in ("Traceback", "CalledProcessError", "ChildFailedError", "torch.distributed"):
        assert words not in output.err


@pytest.mark.faults
@pytest.mark.parametrize("others", ["wait", "miss"])
def test_a_run_goes_on_after_a_kill_if_it_is_told_how(
    two_processes: LaunchPlan,
    probe_environment: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    others: str,
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    asked: list[KilledRank] = []

    def on_kill(killed: KilledRank) -> launcher.Restart:
        asked.append(killed)
        return launcher.Restart(["two"], {"TOLD": "all"}, "it goes on")

    argv = ["rank_probe", "be_killed", "SIGKILL", others]
    assert launcher.run(two_processes, argv, probe_environment, on_kill) == 0
    [killed] = asked
    assert (killed.rank, killed.signal_name, killed.task) == (1, "SIGKILL", "fr-FR")
    output = capfd.readouterr()
    assert "was killed by SIGKILL while it worked on fr-FR" in output.err
    assert ". it goes on" in output.err
    assert "--resume" not in output.err
    assert "rank 0 of two, all" in output.out


@pytest.mark.faults
def test_a_killed_rank_is_named_and_ends_the_run(
    two_processes: LaunchPlan,
    probe_environment: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    assert launcher.run(two_processes, ["rank_probe", "be_killed", "SIGKILL"], probe_environment) == 137
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("meldkit:")]
    assert len(said) == 1
    assert "rank 1 (process " in said[0]
    assert "was killed by SIGKILL" in said[0]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_lets_the_ranks_finish_their_checkpoint(
    probe_environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    run = start(probe_environment, "wait_for_signal", str(tmp_path))
    ranks_ready(tmp_path)
    run.send_signal(signal.Signals[name])
    _, errors = run.communicate(timeout=WAIT_SECONDS)
    assert run.returncode == status.INTERRUPTED, errors
    # Each rank got this signal, and rank 0, which took longer, was not stopped by the end of rank 1.
    assert (tmp_path / "got-0").read_text() == (tmp_path / "got-1").read_text() == name
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert "Traceback" not in errors


@pytest.mark.faults
def test_a_second_signal_kills_what_does_not_end(probe_environment: dict[str, str], tmp_path: Path) -> None:
    run = start(probe_environment, "never_end", str(tmp_path))
    pids = ranks_ready(tmp_path)
    run.send_signal(signal.SIGTERM)
    until(lambda: (tmp_path / "got-0").exists())
    time.sleep(launcher.SAME_WISH_SECONDS)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=WAIT_SECONDS)
    assert run.returncode == 137, errors
    assert "killed at the second signal" in errors
    until(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_no_rank_outlives_a_killed_launcher(probe_environment: dict[str, str], tmp_path: Path) -> None:
    run = start(probe_environment, "never_end", str(tmp_path))
    pids = ranks_ready(tmp_path)
    assert all(is_running(pid) for pid in pids)
    run.kill()
    run.wait()
    until(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
@pytest.mark.parametrize(
    ("actual", "expected", "is_killed"),
    [("1", "1", False), ("1", "4711", True), ("4711", "4711", False), ("1", None, False)],
    ids=["in a container", "the parent has ended", "as usual", "started by hand"],
)
def test_a_parent_that_is_process_1_is_no_dead_parent(actual, expected, is_killed) -> None:
    code = (
        "import os, sys\n"
        f"os.getppid = lambda: {actual}\n"
        "from toolkit.launch.rank import die_with_parent\n"
        "die_with_parent()\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != PARENT_VARIABLE}
    environ |= {PARENT_VARIABLE: expected} if expected is not None else {}
    result = subprocess.run([sys.executable, "-c", code], env=environ, check=False)
    assert result.returncode == (-signal.SIGKILL if is_killed else 0)


def test_what_cannot_start_is_said_with_its_reason(
    two_processes: LaunchPlan, probe_environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.run(two_processes, ["no_such_module"], probe_environment) == 1
    assert "No module named no_such_module" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("exit_statuses", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((0, 75), 75),
        ((75, 1), 1),
        ((1, 2), 2),  # rank 1 found the input wrong, and rank 0 lost its partner
        ((1, 137), 1),
        ((0, 5), 5),
        ((75, 5), 5),
        ((), 1),
    ],
)
def test_the_most_telling_exit_status_wins(exit_statuses: tuple[int, ...], expected: int) -> None:
    assert status.most_telling(exit_statuses) == expected
    assert status.most_telling(reversed(exit_statuses)) == expected


def test_a_rank_reports_its_process_and_then_its_end(tmp_path: Path) -> None:
    status.report(tmp_path, 1, None)
    assert status.read(tmp_path) == [status.RankStatus(1, os.getpid(), None)]
    status.report(tmp_path, 1, 75)
    assert status.read(tmp_path) == [status.RankStatus(1, os.getpid(), 75)]
