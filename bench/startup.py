"""How long commands take that answer without torch, beside an import of transformers.

Every command is a process of its own; the commands take turns, so that a busy machine slows all alike.

    python bench/startup.py --repeats 15 --out bench/results/startup.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MELDKIT = [sys.executable, "-m", "toolkit"]
RECIPE = [*MELDKIT, "train", "centralized-hf"]
COMPLETE = ["--model", "m", "--data", "org/name", "--output-dir", "o"]
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "meldkit --help": [*MELDKIT, "--help"],
    "meldkit train centralized-hf --help": [*RECIPE, "--help"],
    "meldkit train centralized-hf --dry-run": [*RECIPE, *COMPLETE, "--dry-run"],
    "meldkit train centralized-hf --print-config": [*RECIPE, "--config", "centralized-hf", "--print-config"],
    "a misspelt option": [*RECIPE, "--learnin-rate", "3"],
    "trainer_args, checked against the installed SFTConfig": [
        *RECIPE,
        *COMPLETE,
        "--trainer-args",
        "neftune_noise_alpha=5",
        "--print-config",
    ],
    "python -c 'import transformers'": [sys.executable, "-c", "import transformers"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}
PACKAGES = ("meldkit", "pydantic", "torch", "transformers", "trl")
EXPECTED_STATUS = {"a misspelt option": 2}


def processor_seconds() -> float:
    """Return the processor time of all children so far; other processes hardly change it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return wall and processor seconds of every command, ``repeats`` times, after a round that warms the
    file cache."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            for name, command in COMMANDS.items():
                began, busy_before = time.perf_counter(), processor_seconds()
                result = subprocess.run(command, capture_output=True, cwd=folder, check=False)
                elapsed = time.perf_counter() - began
                if result.returncode != EXPECTED_STATUS.get(name, 0):
                    raise SystemExit(f"{name}: exit status {result.returncode}\n{result.stderr.decode()}")
                if repeat > 0:
                    seconds[name].append((elapsed, processor_seconds() - busy_before))
    return seconds


def summary(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return median, quartiles and number of runs of each command, with what it ran on."""
    results = {}
    for name, values in seconds.items():
        wall = [elapsed for elapsed, _ in values]
        low, median, high = statistics.quantiles(wall, n=4)
        results[name] = {
            "median_seconds": round(median, 4),
            "quartile_seconds": [round(low, 4), round(high, 4)],
            "minimum_seconds": round(min(wall), 4),
            "median_processor_seconds": round(statistics.median(busy for _, busy in values), 4),
            "num_runs": len(values),
        }
    return {"results": results, "machine": machine()}


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "num_cpus": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def processor() -> str:
    """Return the name of the processor, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="runs of each command")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    found = summary(measure(max(2, arguments.repeats)))
    text = json.dumps(found, indent=2)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    width = max(len(name) for name in found["results"])
    for name, row in found["results"].items():
        low, high = row["quartile_seconds"]
        wall = f"{row['median_seconds']:.3f} s ({low:.3f} to {high:.3f})"
        sys.stdout.write(f"{name:<{width}}  {wall}, processor {row['median_processor_seconds']:.3f} s\n")


if __name__ == "__main__":
    main()
