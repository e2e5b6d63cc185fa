"""Memory is a few pieces for each thread: neither the size nor the number of models shows in it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toolkit.merging.safetensors_file import header_bytes

PROGRAM = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from merge_child import plan_of
from toolkit.merging.engine import EngineOptions, execute

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

done, peak = threading.Event(), [0]
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

plan = plan_of([Path(p) for p in sys.argv[3:]])
before = anonymous()
threading.Thread(target=watch).start()
try:
    execute(plan, Path(sys.argv[2]), EngineOptions(backend="numba", num_threads=2, verify=True))
finally:
    done.set()
print(peak[0] - before, peak[0])
"""


@pytest.mark.slow
def test_peak_of_anonymous_memory(tmp_path) -> None:
    num_elements = 37_500_000  # 4 models of 150 MB
    folders = []
    for k in range(4):
        folder = tmp_path / f"m{k}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({}))
        sizes = [num_elements, num_elements // 2, num_elements // 2]
        tensors = [(f"t{i}", "bfloat16", (size,), 2 * size) for i, size in enumerate(sizes)]
        with open(folder / "model.safetensors", "wb") as stream:
            stream.write(header_bytes(tensors, {"format": "pt"}))
            for size in sizes:
                stream.write(np.full(size, 0x3F80 + k, np.uint16).tobytes())
        folders.append(str(folder))
    child = Path(__file__).parents[2] / "faults"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(child), str(tmp_path / "out"), *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown, peak = map(int, result.stdout.split())
    assert (
        grown < 100 << 20
    )  # two threads, a few pieces of 0.5 MB each; the reference of --verify works in float64
    assert peak < 300 << 20
