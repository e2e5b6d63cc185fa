"""Memory is a few pieces for each thread: neither the size nor the number of models shows in it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toolkit.merging.streaming.safetensors_file import header_bytes

PROGRAM = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from merge_child import plan_of
from toolkit.merging.streaming.engine import EngineOptions, execute

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

folder, options = Path(sys.argv[2]), EngineOptions(num_threads=2)
execute(plan_of([folder / "tiny"] * 2), folder / "first", options)  # loads and compiles what there is to
done, peak, before = threading.Event(), [0], anonymous_bytes()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous_bytes())

threading.Thread(target=watch).start()
try:
    execute(plan_of([folder / name for name in sys.argv[3:]]), folder / "out", options)
finally:
    done.set()
print(peak[0] - before, peak[0])
"""


@pytest.mark.slow
def test_peak_of_anonymous_memory(tmp_path) -> None:
    names = ["m0", "m1", "m2", "m3"]
    for name in ["tiny", *names]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        sizes = [3000] if name == "tiny" else [37_500_000, 10_000_000, 27_500_000]
        tensors = [(f"t{i}", "bfloat16", (size,), 2 * size) for i, size in enumerate(sizes)]
        with open(tmp_path / name / "model.safetensors", "wb") as stream:
            stream.write(header_bytes(tensors, {"format": "pt"}))
            for size in sizes:
                stream.write(np.full(size, 0x3F80, np.uint16).tobytes())
    child = Path(__file__).parents[2] / "faults"
    command = [sys.executable, "-c", PROGRAM, str(child), str(tmp_path), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    grown, peak = map(int, result.stdout.split())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 150_000_000
    assert (
        grown < 16 << 20
    )  # of 600 MB of inputs: a buffer of 1 MB for each of two threads, and what Python takes
    assert peak < 300 << 20
