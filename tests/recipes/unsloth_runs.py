"""Runs recipes one after another in a process that has Unsloth: ``python unsloth_runs.py TASKS.json``.

TASKS.json: {"runs": {NAME: {"recipe": "centralized-unsloth", "argv": [...]}}, "out": "..."}. Importing Unsloth takes
longer than a small run, so that many of them share one process; the results go to ``out`` as JSON, by name.
"""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path


def main() -> None:
    from toolkit.cli.train import run_recipe

    tasks = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, task in tasks["runs"].items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_recipe(task["recipe"], task["argv"])
        results[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    results["root handlers"] = len(logging.getLogger().handlers)
    Path(tasks["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
