"""``meldkit bench train``: run, judge, summarise, write."""

import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.benchmarks.arms import load_arms
from toolkit.benchmarks.plots import draw
from toolkit.benchmarks.runner import Runner
from toolkit.benchmarks.summary import judge, summarise
from toolkit.benchmarks.tables import report
from toolkit.config.bench_command import BenchTrainConfig
from toolkit.durable import write_json, write_text
from toolkit.errors import ConfigError
from toolkit.reporting import environment

SCHEMA = 1
RESULT_NAME = "benchmark.json"
_OF_THIS_PROCESS = ("command_line", "working_folder", "variables")


def bench_train(
    config: BenchTrainConfig, *, say: Callable[[str], None], watch: Callable[[str], None]
) -> dict[str, Any]:
    """Run the benchmark and write ``benchmark.json``, ``report.md`` and the plots; returns the result.

    Raises:
        InputError: arms, workload or output folder are wrong; nothing was started.
        KeyboardInterrupt: the trials that are done are kept for ``--resume``.
    """
    if config.max_epochs != int(config.max_epochs):
        raise ConfigError(["max_epochs is a whole number here: all arms train all rows equally often"])
    arms = load_arms(config.arms)
    runner = Runner(config, arms, say=say, watch=watch)
    runner.prepare()
    trials = judge(arms, runner.run(), loss_tolerance=config.loss_tolerance)
    # A trial has other variables than this process, and nobody else has these folders.
    machine = {name: value for name, value in environment.describe().items() if name not in _OF_THIS_PROCESS}
    result = {
        "schema": SCHEMA,
        "kind": "train",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["meldkit", *_words(sys.argv[1:])]),
        "workload": {"settings": runner.settings, "facts": runner.workload},
        "repeats": config.repeats,
        "warmup_steps": config.warmup_steps,
        "environment": machine,
        "arms": summarise(
            arms,
            trials,
            warmup_steps=config.warmup_steps,
            gpus=machine["gpus"],
            peak_tflops=config.peak_tflops,
        ),
        "trials": trials,
    }
    write_json(config.out / RESULT_NAME, result)
    write_text(config.out / "report.md", report(result, draw(result, config.out)))
    return result


def _words(arguments: list[str]) -> list[str]:
    """What measures it anew, without secrets."""
    return [word for word in environment.redacted(arguments) if word != "--resume"]


def result_file(path: Path) -> Path:
    """``benchmark.json`` of a folder, or the file itself."""
    return path / RESULT_NAME if path.is_dir() else path
