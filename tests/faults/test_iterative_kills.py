"""kill -9 during iterative training, a merge, a commit or a baseline, then --resume: the run that was never killed."""

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
def run_kills(tmp_path_factory, tiny_encoder, intent_data):
    """run_kills([{"event": N}, …], **options) → the results; the first one is of the run that was not killed."""

    def run(kills: list[dict], *options: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("kills")
        argv = ["--model", tiny_encoder, "--data", intent_data, "--locales", "en-US,fr-FR"]
        argv += [
            "--max-epochs",
            "2",
            "--merge-frequency",
            "1",
            "--batch-size",
            "8",
            "--learning-rate",
            "1e-2",
        ]
        argv += ["--output-dir", folder / "run", "--cpu", *options]
        argv += [] if "full" in options else ["--lora-dropout", "0.1", "--lora-r", "4"]
        tasks = {"recipe": "iterative-merge", "argv": list(map(str, argv)), "kills": kills}
        tasks |= {"output_dir": str(folder / "run"), "out": str(folder / "results.jsonl")}
        (folder / "tasks.json").write_text(json.dumps(tasks))
        subprocess.run(
            [sys.executable, str(SERVER), str(folder / "tasks.json")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            timeout=3000,
        )
        return [json.loads(line) for line in Path(tasks["out"]).read_text().splitlines()]

    return run


def check_equal(results: list[dict]) -> None:
    whole, *killed = results
    assert whole["statuses"] == [0], whole.get("problem")
    assert len(whole["outcome"]["story"]) == 2
    for result in killed:
        assert "problem" not in result, f"{result['kill']}: {result['problem']}"
        assert result["statuses"][-1] == 0, result
        assert result["outcome"] == whole["outcome"], f"{result['kill']} differs"


def count_events(run_kills, *options: str) -> int:
    (whole,) = run_kills([], *options)
    assert whole["statuses"] == [0], whole.get("problem")
    return whole["events"]


def test_random_instants(run_kills):
    """Eight file operations of the run directory, at random over the whole run; two are killed a second time."""
    options = ("--checkpoint-before-merge", "--merge-gate", "--optimizer-on-merge", "merge")
    # How often files are written depends a little on the time: the last operations of one run may not come in another.
    counted = count_events(run_kills, *options) * 9 // 10
    generator = random.Random(20261123)
    kills = [{"event": generator.randint(1, counted)} for _ in range(6)]
    kills += [
        {"event": generator.randint(1, counted), "again": generator.randint(1, counted // 3)}
        for _ in range(2)
    ]
    results = run_kills(kills, *options)
    check_equal(results)
    assert all(result["statuses"][0] == -9 for result in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--finetuning", "full", "--merge-scope", "each")])
def test_every_file_operation(run_kills, options):
    """MELDKIT_KILL_STRIDE=3 takes every third."""
    counted = count_events(run_kills, *options)
    stride = int(os.environ.get("MELDKIT_KILL_STRIDE", "1"))
    check_equal(run_kills([{"event": number} for number in range(1, counted + 1, stride)], *options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--merge-algorithm", "fisher_dataset", "--num-fisher-examples", "8"),
        ("--merge-algorithm", "from_optimizer", "--merge-scope", "each"),
        ("--adaptive-merge-frequency", "--performance-merge-trigger"),
        ("--participants-per-step", "2"),
        ("--early-stopping-patience", "1"),
    ],
)
def test_random_times(run_kills, options):
    generator = random.Random(7)
    whole, *killed = run_kills([{"seconds": generator.uniform(0.3, 6.0)} for _ in range(4)], *options)
    assert whole["statuses"] == [0], whole.get("problem")
    for result in killed:
        assert result.get("outcome") == whole["outcome"], result


def test_sigterm_commits_and_continues(run_kills):
    whole, *stopped = run_kills([{"seconds": 1.5, "signal": 15}, {"seconds": 3.0, "signal": 2}])
    for result in stopped:
        assert result["statuses"] in ([75, 0], [0]), result
        assert result["outcome"]["lasting"] == whole["outcome"]["lasting"]
        assert result["outcome"]["steps"] == whole["outcome"]["steps"]
