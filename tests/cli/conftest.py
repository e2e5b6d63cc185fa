import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "unsloth", "numpy", "hassil")


@pytest.fixture
def meldkit(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in an empty folder, in a process of its own."""

    def call(*argv: str, timeout_seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "LOCAL_", "COLUMNS"))
        }
        return subprocess.run(
            [sys.executable, "-m", "toolkit", *argv],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment},
            timeout=timeout_seconds,
            check=False,
        )

    return call


@pytest.fixture
def heavy_imports(tmp_path: Path) -> Callable[[list[str]], tuple[int, list[str]]]:
    """Return the exit status of a command line, and which heavy packages it imported."""

    def call(argv: list[str]) -> tuple[int, list[str]]:
        code = (
            "import sys\n"
            "from toolkit.cli.main import main\n"
            f"status = main({argv!r})\n"
            f"found = sorted(set({HEAVY!r}) & sys.modules.keys())\n"
            "sys.stderr.write('\\nIMPORTED ' + ' '.join(found))\n"
            "sys.exit(status)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            timeout=60,
            check=False,
        )
        assert "\nIMPORTED" in result.stderr, result.stderr
        return result.returncode, result.stderr.rsplit("\nIMPORTED", 1)[1].split()

    return call
