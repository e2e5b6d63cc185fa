"""Does meldkit bench compare let identical code pass, and catch a slowdown of 20 %, on real trials of this machine?

    python bench/compare_gate.py [--repeats 30] [--trials TRIALS.json] [--out bench/results/compare_gate.json]

Trials of the tiny model, of the recipe as it is and of the recipe asleep for a fifth of every step, alternate. Each six
consecutive trials of an arm are one result (three are too few for these short trials on a machine that others share:
see docs/benchmarks.md). Identical code: each two results of an arm. Planted: each result of the recipe as it is against
each of the slowed one.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from toolkit.benchmarks.arms import load_arms
from toolkit.benchmarks.compare import compare, load_result
from toolkit.benchmarks.summary import summarise
from toolkit.config.bench_command import BenchCompareConfig

HERE = Path(__file__).resolve().parent
PLAIN, SLOWED = "hf-plain", HERE / "arms" / "slowed.yaml"
WORKLOAD = ["--model", "sample:tiny-llama", "--max-length", "256", "--max-rows", "64", "--max-epochs", "24"]
WORKLOAD += ["--lora-r", "4", "--no-gradient-checkpointing", "--mixed-precision", "no", "--cpu"]


def result_of(whole: dict[str, Any], arm: str, group: int, trials_a_result: int) -> dict[str, Any]:
    """The trials of an arm in one group of repeats, as a result of their own; the arm is called the same in all."""
    repeats = range(group * trials_a_result, (group + 1) * trials_a_result)
    trials = [trial for trial in whole["trials"] if trial["arm"] == arm and trial["repeat"] in repeats]
    (definition,) = load_arms([arm if arm == PLAIN else str(SLOWED)])
    summary = summarise([definition], trials, warmup_steps=whole["warmup_steps"], gpus=[], peak_tflops=None)
    summary[0]["arm"]["name"] = "gate"
    renamed = [trial | {"arm": "gate"} for trial in trials]
    return whole | {"arms": summary, "trials": renamed}


def measured(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "toolkit",
            "bench",
            "train",
            "--arms",
            f"{PLAIN},{SLOWED}",
            *WORKLOAD,
        ]
        subprocess.run([*command, "--repeats", str(repeats), "--out", f"{folder}/bench"], check=True)
        return load_result(Path(folder) / "bench")


def judged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    config = BenchCompareConfig.model_validate({"runs": ["old", "new"]})
    (change,) = compare(old, new, config)
    assert change.slowdown is not None
    interval = [change.slowdown.low, change.slowdown.high]
    return {"slowdown": change.slowdown.value, "interval": interval, "failures": change.failures}


def comparisons(whole: dict[str, Any], trials_a_result: int) -> dict[str, Any]:
    groups = range(whole["repeats"] // trials_a_result)
    plain, slowed = (
        [result_of(whole, arm, group, trials_a_result) for group in groups] for arm in (PLAIN, "slowed")
    )
    pairs = [*itertools.combinations(plain, 2), *itertools.combinations(slowed, 2)]
    identical = [judged(old, new) for old, new in pairs]
    planted = [judged(old, new) for old, new in itertools.product(plain, slowed)]
    return {
        "trials_a_result": trials_a_result,
        "identical_passed": sum(not one["failures"] for one in identical),
        "identical_compared": len(identical),
        "planted_caught": sum(bool(one["failures"]) for one in planted),
        "planted_compared": len(planted),
        "identical": identical,
        "planted": planted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--trials-a-result", type=int, default=6)
    parser.add_argument(
        "--trials", type=Path, help="a file of all trials: judged again if there, else written"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.trials and arguments.trials.exists():
        whole = json.loads(arguments.trials.read_text())
    else:
        whole = measured(arguments.repeats)
        if arguments.trials:
            arguments.trials.write_text(json.dumps(whole) + "\n")
    outcome = comparisons(whole, arguments.trials_a_result)
    for kind, good in (("identical", "passed"), ("planted", "caught")):
        print(f"{kind}: {outcome[f'{kind}_{good}']} of {outcome[f'{kind}_compared']} {good}")
    if arguments.out:
        environment = whole["environment"]
        command = f"python bench/compare_gate.py --repeats {whole['repeats']}"
        known = {"command": command, "machine": environment["cpu"], "versions": environment["versions"]}
        arguments.out.write_text(json.dumps(known | outcome, indent=2) + "\n")


if __name__ == "__main__":
    main()
