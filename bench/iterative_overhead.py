"""What iterative merging costs besides training and evaluation, with full fine-tuning and a merge after every epoch.

    python bench/iterative_overhead.py [--rows 2000] [--epochs 2] [--out bench/results/iterative_overhead.json]

Two locales train multilingual-e5-small whole (118 M parameters, 1.4 GB a checkpoint) on their intents, all 5300 and
5600 rows; after every epoch both are evaluated, merged, evaluated again and committed. The clock of the run is split
between phases, each second counting for one phase only: a phase that begins inside another one stops the clock of that
one. Asked: all that is neither a training step nor an evaluation takes at most 5 % of the run's wall time.

Overhead is what grows with epochs, merges and locales; it is the same for few rows as for many, so its share is larger
for few. Start-up (rows, building models) is listed by itself, and a second share counts it in. About 20 minutes.
"""

import argparse
import functools
import importlib
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASKED_SHARE = 0.05
STEPS, EVALUATION, START = "training steps", "evaluation", "start-up"
REST = "everything else"
PHASES = {
    START: (
        "toolkit.rounds.iterative:prepare_locales",
        "toolkit.rounds.participants:TrainerFactory.build",
        "toolkit.training.hf:HFTrainer.start",
    ),
    "around the steps": ("toolkit.training.hf:HFTrainer.fit",),
    EVALUATION: ("toolkit.training.hf:HFTrainer.evaluate_rows",),
    "checkpoints: write": ("toolkit.training.hf:HFTrainer.save",),
    "checkpoints: sync and hash": ("toolkit.rounds.checkpoints:commit_folder",),
    "checkpoints: delete": ("toolkit.rounds.checkpoints:discard_folder",),
    "merge: copy states": ("toolkit.training.hf:HFTrainer.state",),
    "merge: combine": ("toolkit.rounds.merging.coordinator:MergeCoordinator.merge",),
    "merge: hand out": ("toolkit.training.hf:HFTrainer.load_state",),
    "merged models": ("toolkit.rounds.merging.merged_models:MergedModels.add",),
    "final models": ("toolkit.rounds.hand_over:write_final_model",),
    "journal": ("toolkit.rounds.journal:Journal.append",),
    "reports": (
        "toolkit.reporting.listeners:Listeners.handle",
        "toolkit.reporting.listeners:Listeners.flush",
        "toolkit.reporting.listeners:Listeners.close",
    ),
    "comparison": ("toolkit.rounds.iterative:IterativeRun._compare",),
}
"""Phase to the functions whose time counts for it."""


class PhaseClock:
    """Splits the time of a thread between phases; the innermost one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open = [REST]
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.lap()
        self.calls[name] += 1
        self._open.append(name)
        try:
            yield
        finally:
            self.lap()
            self._open.pop()

    def lap(self) -> None:
        """Give the time since the last lap to the open phase."""
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self.cpu_seconds[self._open[-1]] += cpu_now - self._cpu_since
        self._since, self._cpu_since = now, cpu_now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Wall time that was counted for ``source`` and belongs to ``target``."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def watch(self, place: str, name: str) -> None:
        """Let the calls of ``module:name`` count for a phase."""
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *owners, attribute = path.split(".")
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, self._timed(getattr(owner, attribute), name))

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return timed


def measure(options: dict[str, Any], output_dir: Path) -> tuple[PhaseClock, dict[str, Any]]:
    """Run once; returns the clock, and what the run's own records say."""
    from toolkit.cli.samples import make_samples
    from toolkit.cli.train import run_config
    from toolkit.iterative import create_default_config

    config = create_default_config(options.pop("locales"), output_dir=output_dir, **options)
    make_samples(config)
    clock = PhaseClock()
    with clock.phase(START):
        for name, places in PHASES.items():
            for place in places:
                clock.watch(place, name)
    in_steps = _watch_steps(clock)
    status = run_config("iterative-merge", config)
    clock.lap()
    assert status == 0
    merges = json.loads((output_dir / "merge_history.json").read_text())["merges"]
    return clock, {
        "num_steps": len(in_steps),
        "seconds_per_step": sum(in_steps) / len(in_steps),
        "num_merges": len(merges),
        "merge_seconds_recorded": sum(merge["seconds"] for merge in merges),
    }


def _watch_steps(clock: PhaseClock) -> list[float]:
    """The seconds of every training step, which become a phase of their own within the trainer's."""
    from toolkit.rounds.iterative import IterativeRun

    seconds: list[float] = []
    record_step = IterativeRun.record_step

    @functools.wraps(record_step)
    def recorded(self: IterativeRun, participant: str, step: Any, num_steps: int) -> None:
        seconds.append(step.step_seconds)
        clock.move(step.step_seconds, "around the steps", STEPS)
        with clock.phase("reports"):
            record_step(self, participant, step, num_steps)

    IterativeRun.record_step = recorded
    return seconds


def report(clock: PhaseClock) -> dict[str, Any]:
    wall = sum(clock.seconds.values())
    start = clock.seconds[START]
    overhead = wall - start - clock.seconds[STEPS] - clock.seconds[EVALUATION]
    phases = sorted(clock.seconds.items(), key=lambda item: -item[1])
    return {
        "wall_seconds": round(wall, 2),
        "overhead_seconds": round(overhead, 2),
        "overhead_share": round(overhead / (wall - start), 4),
        "overhead_share_with_start_up": round((overhead + start) / wall, 4),
        "asked_share": ASKED_SHARE,
        "phases": {
            name: {
                "seconds": round(s, 3),
                "cpu_seconds": round(clock.cpu_seconds[name], 3),
                "share": round(s / wall, 4),
                "calls": clock.calls[name],
            }
            for name, s in phases
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--locales", default="en-US,fr-FR")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, help="training rows of each locale; without it all")
    parser.add_argument("--algorithm", default="linear")
    parser.add_argument("--model", default="sample:multilingual-e5-small")
    parser.add_argument("--data", default="sample:intents:{locale}")
    parser.add_argument("--workspace", type=Path, help="where the run is written, and deleted; 12 GB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = {
        "locales": arguments.locales.split(","),
        "model": arguments.model,
        "data": arguments.data,
        "max_rows": arguments.rows,
        "max_epochs": arguments.epochs,
        "finetuning": "full",
        "learning_rate": 5e-5,
        "merge_algorithm": arguments.algorithm,
        "merge_frequency": 1,
        "baselines": False,
        "cpu": True,
    }
    shown = {name: value for name, value in options.items() if name != "cpu"}
    with tempfile.TemporaryDirectory(dir=arguments.workspace) as folder:
        clock, records = measure(options, Path(folder) / "run")
    import torch

    result = {
        "command": "python bench/iterative_overhead.py",
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "options": shown,
        **records,
        **report(clock),
    }
    rounds = len(arguments.locales.split(",")) * arguments.epochs
    result["overhead_seconds_a_locale_and_epoch"] = round(result["overhead_seconds"] / rounds, 2)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
