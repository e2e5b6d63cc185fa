"""The Triton backend without a GPU: what its kernels compute, in Triton's interpreter, and what they are compiled to.

Whether Triton interprets or compiles is decided when it is imported, and its interpreter changes Triton for good; so
each runs in a process of its own: the tests stand in triton_interpreted.py and triton_compiled.py beside this file.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.parametrize(("file", "interpret"), [("triton_interpreted.py", "1"), ("triton_compiled.py", "0")])
def test_in_a_process_of_its_own(file, interpret):
    path = Path(__file__).parent / file
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    root = Path(__file__).parents[2]
    cache = root / ".cache" / "triton"  # compiled kernels, for the next time
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}{result.stderr[-2000:]}"
    assert " passed" in result.stdout
