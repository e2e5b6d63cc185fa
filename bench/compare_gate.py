"""Does meldkit bench compare let identical code pass, and catch a slowdown of 20 %, on real trials of this machine?

    python bench/compare_gate.py [--repeats 30] [--out bench/results/compare_gate.json]

Trials of the tiny model, of the recipe as it is and of the recipe asleep for a fifth of every step, alternate. Each
three consecutive trials of an arm are one result. Identical code: each result against the next one of its arm. Planted:
each result against that of the slowed arm from the same time.
"""

import argparse
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
SLOWED = HERE / "arms" / "slowed.yaml"
TRIALS_A_RESULT = 3
WORKLOAD = ["--model", "sample:tiny-llama", "--max-length", "256", "--max-rows", "64", "--max-epochs", "4"]
WORKLOAD += ["--lora-r", "4", "--no-gradient-checkpointing", "--mixed-precision", "no", "--cpu"]


def result_of(whole: dict[str, Any], arm: str, group: int) -> dict[str, Any]:
    """The trials of an arm in one group of repeats, as a result of their own; the arm is called the same in all."""
    repeats = range(group * TRIALS_A_RESULT, (group + 1) * TRIALS_A_RESULT)
    trials = [trial for trial in whole["trials"] if trial["arm"] == arm and trial["repeat"] in repeats]
    (definition,) = load_arms([arm if arm == "hf-plain" else str(SLOWED)])
    summary = summarise([definition], trials, warmup_steps=whole["warmup_steps"], gpus=[], peak_tflops=None)
    summary[0]["arm"]["name"] = "gate"
    renamed = [trial | {"arm": "gate"} for trial in trials]
    return whole | {"arms": summary, "trials": renamed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trials", type=Path, help="a file for all trials, to look at them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "toolkit",
            "bench",
            "train",
            "--arms",
            f"hf-plain,{SLOWED}",
            *WORKLOAD,
        ]
        command += ["--repeats", str(arguments.repeats), "--out", f"{folder}/bench"]
        subprocess.run(command, check=True)
        whole = load_result(Path(folder) / "bench")
    if arguments.trials:
        arguments.trials.write_text(json.dumps(whole) + "\n")
    config = BenchCompareConfig.model_validate({"runs": ["old", "new"]})
    groups = range(arguments.repeats // TRIALS_A_RESULT)
    results = {arm: [result_of(whole, arm, group) for group in groups] for arm in ("hf-plain", "slowed")}

    def judged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        (change,) = compare(old, new, config)
        assert change.slowdown is not None
        interval = [change.slowdown.low, change.slowdown.high]
        return {"slowdown": change.slowdown.value, "interval": interval, "failures": change.failures}

    identical = [
        judged(of_arm[group], of_arm[(group + 1) % len(of_arm)])
        for of_arm in results.values()
        for group in groups
    ]
    planted = [judged(results["hf-plain"][group], results["slowed"][group]) for group in groups]
    report = {
        "command": f"python bench/compare_gate.py --repeats {arguments.repeats}",
        "machine": whole["environment"]["cpu"],
        "versions": whole["environment"]["versions"],
        "identical_passed": sum(not row["failures"] for row in identical),
        "identical": identical,
        "planted_caught": sum(bool(row["failures"]) for row in planted),
        "planted": planted,
    }
    print(f"identical code: {report['identical_passed']} of {len(identical)} pass")
    print(f"20 % slower: {report['planted_caught']} of {len(planted)} caught")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
