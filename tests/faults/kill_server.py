"""Runs a recipe many times from one process that has imported everything, kills some of the runs, resumes them.

    python kill_server.py TASKS.json

TASKS.json: {"recipe": "centralized-hf", "argv": [...], "output_dir": "...",
"kills": [{"event": N} | {"seconds": S}, ...], "out": "..."}

For each kill: a forked child runs the recipe and is killed with SIGKILL, at its N-th file operation in the run
directory or after S seconds; further children resume it until it is done (each may be killed again: "again": M). The
results, one a line of JSON: exit statuses and what the run left. Forking spares the six seconds of imports a run.
"""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"}


def install_kill(output_dir: str, at_event: int) -> list[int]:
    """Kill this process at its N-th file operation that names the run directory."""
    counter = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS or output_dir not in str(arguments[0]):
            return
        counter[0] += 1
        if counter[0] == at_event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter


def run_child(recipe: str, argv: list[str], output_dir: str, log: Path, kill: dict) -> int:
    """Fork, run, kill; returns the exit status, negative for a signal as subprocess does it."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        counter = install_kill(output_dir, kill.get("event", -1))
        from toolkit.cli.train import run_recipe

        status = 1
        try:
            status = run_recipe(recipe, argv)
        finally:
            print(f"FILE-EVENTS {counter[0]}", flush=True)
            os._exit(status)
    if "seconds" in kill:
        time.sleep(kill["seconds"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, kill.get("signal", signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def outcome(output_dir: Path) -> dict:
    """What must not depend on kills: weights, losses, order of rows, counts, evaluations."""
    history = json.loads((output_dir / "training_history.json").read_text())
    columns = ("step", "loss", "learning_rate", "grad_norm", "total_tokens", "batch_digest")
    steps = [[row.get("participant"), *(row[key] for key in columns)] for row in history["steps"]]
    evaluations = [
        [row.get("participant"), row["step"], row["phase"], row["metrics"]] for row in history["evaluations"]
    ]
    files: dict[str, list[str]] = {}
    for path in sorted([*output_dir.rglob("*.safetensors"), *output_dir.rglob("*.npz")]):
        place = path.relative_to(output_dir)
        if place.parts[0] == "merged_models":  # their names have the time in them
            place = Path(place.parts[0], path.name)
        files.setdefault(str(place), []).append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert files, "no weights"
    return {
        "files": files,
        # A stop in mid-epoch leaves a checkpoint of its own, which may be among those that are kept.
        "lasting": {place: digests for place, digests in files.items() if "/checkpoints/" not in place},
        "steps": [row[1:] if row[0] in (None, "model") else row for row in steps],
        "evaluations": evaluations,
        "story": [
            [row[key] for key in ("round", "status", "weights", "gate", "before", "after")]
            for row in history.get("merges", [])
        ],
        "leftovers": [
            p.name for p in output_dir.iterdir() if p.name.startswith((".staging-final", ".trash"))
        ],
    }


def main() -> None:
    tasks = json.loads(Path(sys.argv[1]).read_text())
    recipe = tasks.get("recipe", "centralized-hf")
    if recipe == "centralized-unsloth":  # which has to come before everything below
        importlib.import_module("toolkit.training.unsloth_process").enter_unsloth("cpu")
    for module in (
        "toolkit.rounds.centralized",
        "toolkit.rounds.iterative",
        "toolkit.training.hf",
    ):  # paid once
        importlib.import_module(module)

    argv, output_dir = tasks["argv"], Path(tasks["output_dir"])
    log = output_dir.with_suffix(".log")
    with open(tasks["out"], "w") as out:
        for kill in [{}, *tasks["kills"]]:
            shutil.rmtree(output_dir, ignore_errors=True)
            log.unlink(missing_ok=True)
            statuses = [run_child(recipe, argv, str(output_dir), log, kill)]
            again = kill.get("again")
            while statuses[-1] != 0 and len(statuses) < 6:
                resume = ["--resume"] if (output_dir / "journal.jsonl").exists() else []
                statuses.append(
                    run_child(
                        recipe, [*argv, *resume], str(output_dir), log, {"event": again} if again else {}
                    )
                )
                again = None
            text = log.read_text()
            events = [int(line.split()[1]) for line in text.splitlines() if line.startswith("FILE-EVENTS")]
            result = {"kill": kill, "statuses": statuses, "events": events[-1] if events else None}
            try:
                result["outcome"] = outcome(output_dir)
            except (OSError, ValueError, StopIteration) as error:
                result["problem"] = f"{error!r}\n{text[-3000:]}"
            out.write(json.dumps(result) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
