"""A trial's process: alone in its own group, with a scrubbed environment, watched and ended by the clock."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

import toolkit

KEPT = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "XDG_CACHE_HOME",
    "MELDKIT_CACHE",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "OMP_NUM_THREADS",
)
"""Variables that a trial inherits. All others steer training (UNSLOTH_*, TORCHINDUCTOR_*, ACCELERATE_*, ...)."""
FAILED, OUT_OF_MEMORY, FELL_BACK = 1, 3, 4
"""Exit statuses of a trial's process."""
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 5.0
"""Between asking a group of processes to end and ending it."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit_status: negative for a signal, as subprocess has it.
        timed_out: it was ended by the clock.
        seconds: it lived.
        peak_tree_rss_bytes: most resident memory that it and its children had together, looked at ten times a second.
        load_average: of the machine, over the last minute, as it began.
    """

    exit_status: int
    timed_out: bool
    seconds: float
    peak_tree_rss_bytes: int
    load_average: float


def environment(own: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a trial: what is kept, caches of compiled code in ``own``, and what the arm sets."""
    variables = {name: os.environ[name] for name in KEPT if name in os.environ}
    source_root = str(Path(toolkit.__file__).resolve().parent.parent)
    kernels = str(Path(source_root) / "kernels")
    return variables | {
        "PYTHONPATH": os.pathsep.join([source_root, kernels]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TRITON_CACHE_DIR": str(own / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(own / "unsloth"),
        "HF_DATASETS_CACHE": str(own / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def run_process(
    command: list[str],
    log: Path,
    variables: Mapping[str, str],
    *,
    timeout_seconds: float,
    on_poll: Callable[[float], None] = lambda seconds: None,
) -> Ended:
    """Run ``command`` with its output in ``log``; whatever happens here, nothing of its group is left.

    Args:
        on_poll: called ten times a second with the seconds since it began.
    """
    load_average = os.getloadavg()[0]
    began, peak, timed_out = time.monotonic(), 0, False
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                peak = max(peak, _tree_rss_bytes(process.pid))
                seconds = time.monotonic() - began
                on_poll(seconds)
                if seconds > timeout_seconds:
                    timed_out = True
                    break
                time.sleep(POLL_SECONDS)
        finally:
            _end_group(process)
    return Ended(process.returncode, timed_out, time.monotonic() - began, peak, load_average)


def _tree_rss_bytes(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process's own group, and no other: it leads one."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
