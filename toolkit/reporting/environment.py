"""What a run ran on: versions, devices, code revision, command line. The content of environment.json."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from toolkit.reporting import resources

PACKAGES = (
    "meldkit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "deepspeed",
    "unsloth",
    "unsloth-zoo",
    "flwr",
    "triton",
    "numpy",
    "pydantic",
    "huggingface-hub",
    "gguf",
    "tensorboard",
    "wandb",
    "trackio",
)
VARIABLES = re.compile(
    r"(CUDA|NVIDIA|NCCL|TORCH|PYTORCH|OMP|MKL|OPENBLAS|ACCELERATE|DEEPSPEED|DS|TRANSFORMERS|TOKENIZERS|HF|TRITON|XLA|GLOO|"
    r"MELDKIT|WANDB|TRACKIO|BNB|UNSLOTH|SLURM)_.*|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|"
    r"LANG|LC_ALL|PYTHONHASHSEED|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX"
)
# Words of an option's name: --hub-token is secret, --sample-tokens is not.
SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials", "auth"}
SECRET = re.compile(r"TOKEN(?!IZERS_)|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
GIT_TIMEOUT_SECONDS = 10


def describe() -> dict[str, Any]:
    """Everything about the machine and the software that a run depends on, as JSON values.

    Nothing is imported for it: versions come from the packages' metadata. Environment variables are those
    that steer training, by name; never one whose name or value looks like a secret.
    """
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": versions(),
        "cpu": {
            "model": cpu_model(),
            "logical_cores": os.cpu_count(),
            "physical_cores": psutil.cpu_count(logical=False),
            "usable_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": resources.gpu_names(),
        "gpu_driver": resources.driver_version(),
        "git": git_revision(Path(__file__).parent),
        "command_line": redacted([sys.executable, *sys.argv]),
        "working_folder": os.getcwd(),
        "variables": variables(),
    }


def versions() -> dict[str, str]:
    """Installed packages that matter, and their versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def variables() -> dict[str, str]:
    """Environment variables that steer training, without secrets."""
    return {
        name: _without_password(value)
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name) and not SECRET.search(name)
    }


def redacted(arguments: list[str]) -> list[str]:
    """``arguments`` with the values of options that look like secrets replaced by ``***``."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        words = set(re.split(r"[-_.]+", name.lower()))
        is_secret_option = argument.startswith("-") and bool(words & SECRET_WORDS)
        if hide_next and not argument.startswith("-"):
            shown.append("***")
        elif is_secret_option and equals:
            shown.append(f"{name}=***")
        else:
            shown.append(_without_password(argument))
        hide_next = is_secret_option and not equals
    return shown


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def git_revision(folder: Path) -> dict[str, Any] | None:
    """``revision``, ``branch`` and ``is_dirty`` of the checkout that holds ``folder``; None without one."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(folder), *arguments]
        # Optional locks off: asking must not disturb a git command of the user.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=GIT_TIMEOUT_SECONDS,
                env=environment,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package inside somebody's repository (a .venv in a checkout) is not that repository's code.
    if ask("ls-files", "--error-unmatch", str(Path(__file__))) is None and folder == Path(__file__).parent:
        return None
    revision = ask("rev-parse", "HEAD")
    if revision is None:
        return None
    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {
        "revision": revision,
        "branch": ask("branch", "--show-current"),
        "is_dirty": None if changes is None else changes != "",
    }


def _without_password(text: str) -> str:
    """``https://user:word@host`` as ``https://***@host``."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
