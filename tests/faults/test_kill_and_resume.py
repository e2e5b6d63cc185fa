"""kill -9 at any instant, then --resume: bit for bit the run that was never killed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
SERVER = Path(__file__).with_name("kill_server.py")


@pytest.fixture(scope="module")
def run_kills(tmp_path_factory, tiny_model, chat_data):
    """run_kills([{"event": N}, …], **options) → the results; the first one is of the run that was not killed."""

    def run(kills: list[dict], *options: str, recipe: str = "centralized-hf") -> list[dict]:
        folder = tmp_path_factory.mktemp("kills")
        argv = ["--model", tiny_model, "--data", chat_data["train"], "--eval-data", chat_data["valid"]]
        argv += [
            "--output-dir",
            folder / "run",
            "--max-length",
            "160",
            "--max-epochs",
            "2",
            "--batch-size",
            "2",
        ]
        argv += [
            "--gradient-accumulation-steps",
            "2",
            "--learning-rate",
            "1e-2",
            "--cpu",
        ]
        argv += ["--checkpoint-every", "2", "--eval-every", "3", *options]
        argv += [] if "full" in options else ["--lora-dropout", "0.1"]
        tasks = {
            "recipe": recipe,
            "argv": list(map(str, argv)),
            "output_dir": str(folder / "run"),
            "kills": kills,
        }
        tasks["out"] = str(folder / "results.jsonl")
        (folder / "tasks.json").write_text(json.dumps(tasks))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, str(SERVER), str(folder / "tasks.json")],
            env=environment,
            check=True,
            timeout=3000,
        )
        return [json.loads(line) for line in Path(tasks["out"]).read_text().splitlines()]

    return run


def check_equal(results: list[dict]) -> None:
    whole, *killed = results
    assert whole["statuses"] == [0], whole.get("problem")
    assert [s[0] for s in whole["outcome"]["steps"]] == list(range(1, 13))
    for result in killed:
        assert "problem" not in result, f"{result['kill']}: {result['problem']}"
        assert result["statuses"][-1] == 0, result
        assert result["outcome"] == whole["outcome"], f"{result['kill']} differs"


def count_events(run_kills) -> int:
    """File operations in the run directory of a run that is not killed."""
    (whole,) = run_kills([])
    assert whole["statuses"] == [0], whole.get("problem")
    assert whole["events"] > 100
    return whole["events"]


def test_ten_random_instants(run_kills):
    """Ten file operations of the run directory, chosen at random over the whole run; three are killed a second time."""
    # How often files are written depends a little on the time: the last operations of one run may not come in another.
    counted = count_events(run_kills) * 9 // 10
    generator = random.Random(20261122)
    kills = [{"event": generator.randint(1, counted)} for _ in range(7)]
    kills += [
        {"event": generator.randint(1, counted), "again": generator.randint(1, counted // 3)}
        for _ in range(3)
    ]
    results = run_kills(kills)
    check_equal(results)
    assert all(result["statuses"][0] == -9 for result in results[1:])
    assert sum(len(result["statuses"]) > 2 for result in results[1:]) >= 1


@pytest.mark.slow
def test_every_file_operation(run_kills):
    """About half an hour; MELDKIT_KILL_STRIDE=3 takes every third."""
    counted = count_events(run_kills)
    stride = int(os.environ.get("MELDKIT_KILL_STRIDE", "1"))
    check_equal(run_kills([{"event": number} for number in range(1, counted + 1, stride)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--length-grouping",), ("--packing",), ("--finetuning", "full"), ("--use-dora",), ("--load-in-4bit",)],
)
def test_random_times(run_kills, options):
    generator = random.Random(7)
    whole, *killed = run_kills([{"seconds": generator.uniform(0.3, 3.0)} for _ in range(5)], *options)
    assert whole["statuses"] == [0], whole.get("problem")
    for result in killed:
        assert result.get("outcome") == whole["outcome"], result


def test_sigterm_commits_and_continues(run_kills):
    results = run_kills([{"seconds": 1.2, "signal": 15}, {"seconds": 1.5, "signal": 2}])
    whole, *stopped = results
    for result in stopped:
        assert result["statuses"] in ([75, 0], [0]), result
        outcome = result["outcome"]
        assert outcome["lasting"] == whole["outcome"]["lasting"]
        assert outcome["steps"] == whole["outcome"]["steps"]


def test_a_run_with_unsloth(run_kills):
    """Killed early, late, and in the middle and once more while it resumes."""
    kills: list[dict] = [{"event": number} for number in (120, 280)]
    kills += [{"event": 200, "again": 60}]
    check_equal(run_kills(kills, recipe="centralized-unsloth"))
