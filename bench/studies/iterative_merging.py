"""Does merging while training help? Four methods, two scopes, gate on and off, against no merge; six locales, 3 seeds.

    python bench/studies/iterative_merging.py [--workspace runs/iterative_merging] [--out bench/results]

Three locales have 128 training rows each, of ten intents. Three have 32 (low-resource), of which each comes four times
an epoch: they lack examples, and not steps. Every cell (method, scope, gate, seed) is a run of the recipe in a
directory of its own; one more run a seed never merges, and is what all cells of that seed are compared with: the same
rows, steps and seed.
Run the command again to go on: finished cells are skipped, one that was stopped goes on from its last commit.

Written: ``iterative_merging.json`` (every arm, interval and verdict) and ``iterative_merging.md`` (tables). Accuracy is
on test rows that neither training nor gate has seen; intervals are a paired bootstrap of rows and seeds.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from iterative_tables import as_markdown

from toolkit.durable import write_json, write_text
from toolkit.errors import Interrupted, MeldkitError

RICH, LOW = ("en-US", "de-DE", "fr-FR"), ("sq-AL", "is-IS", "eu-ES")
LOCALES = (*RICH, *LOW)
METHODS = ("linear", "fisher_dataset", "from_optimizer", "ties")
SCOPES = ("target", "each")
SEEDS = (1, 2, 3)
INTENTS = [
    *("HassTurnOn", "HassTurnOff", "HassGetState", "HassLightSet", "HassStartTimer", "HassCancelTimer"),
    *("HassClimateSetTemperature", "HassClimateGetTemperature", "HassMediaPause", "HassMediaNext"),
]
"""Of which every locale has rows enough; with all 60, so few rows teach too little for any comparison."""
ROWS_PER_INTENT = 200
NUM_HELD_OUT = {"validation": 40, "test": 150}
NUM_RICH, NUM_LOW, TIMES_LOW = 128, 32, 4
OPTIONS: dict[str, Any] = {
    "model": "sample:multilingual-e5-small",
    "finetuning": "lora",
    "max_rows": NUM_RICH,
    "max_epochs": 4,
    "batch_size": 16,
    "length_grouping": True,
    "max_duplicates": 1.0,
    "warmup_ratio": 0.1,
    "learning_rate": 3e-3,
    "checkpoint_every": "never",
    "report_to": [],
    "log_level": "WARNING",
    "cpu": True,
}
MERGES: dict[str, Any] = {"merge_frequency": 2, "weight_calculation": "similarity", "baselines": False}
FISHER: dict[str, Any] = {"fisher_data_mode": "sources", "num_fisher_examples": 48, "fisher_batch_size": 16}


@dataclass(frozen=True)
class Cell:
    """One run: merging in one way with one seed; ``method`` None: never."""

    seed: int
    method: str | None = None
    scope: str = "target"
    gate: bool = False

    @property
    def name(self) -> str:
        if self.method is None:
            return f"no-merge-seed{self.seed}"
        return f"{self.method}-{self.scope}-{'gate' if self.gate else 'free'}-seed{self.seed}"

    def options(self) -> dict[str, Any]:
        if self.method is None:
            never = {"merge_frequency": OPTIONS["max_epochs"] + 1}
            return OPTIONS | never | {"baselines": True, "seed": self.seed}
        own = {"merge_algorithm": self.method, "merge_scope": self.scope, "merge_gate": self.gate}
        fisher = FISHER if self.method == "fisher_dataset" else {}
        return OPTIONS | MERGES | fisher | own | {"seed": self.seed}


def all_cells() -> list[Cell]:
    """Seed after seed, so that a study that was stopped has whole tables of fewer seeds."""
    ways = list(product(METHODS, SCOPES, (False, True)))
    return [cell for seed in SEEDS for cell in (Cell(seed), *(Cell(seed, *way) for way in ways))]


# --- running


def make_data(workspace: Path) -> None:
    """Rows of ten intents of every locale; of the held-out ones the first few, which leaves more time for training."""
    from toolkit.data.samples.catalog import make

    made = make("intents", workspace / "sample", locales=list(LOCALES), rows_per_intent=ROWS_PER_INTENT)
    staged = workspace / "data-staged"
    for source in sorted(made.glob("*/*.jsonl")):
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line for line in lines if json.loads(line)["intent"] in INTENTS]
        lines = lines[: NUM_HELD_OUT.get(source.stem)]
        if source.stem == "train" and source.parent.name in LOW:
            lines = lines[:NUM_LOW] * TIMES_LOW
        write_text(staged / source.relative_to(made), "".join(lines))
    staged.rename(workspace / "data")


def is_finished(folder: Path) -> bool:
    from toolkit.iterative import TrainingStateManager

    return (folder / "journal.jsonl").is_file() and TrainingStateManager(folder).is_finished


def run_cell(cell: Cell, workspace: Path) -> None:
    """Run or continue a cell; what it says goes into a file beside it."""
    from toolkit.cli.train import run_config
    from toolkit.iterative import create_default_config

    folder = workspace / cell.name
    if is_finished(folder):
        return
    config = create_default_config(
        LOCALES,
        data=f"{workspace / 'data'}/{{locale}}",
        output_dir=folder,
        **cell.options(),
    ).model_copy(update={"resume": (folder / "journal.jsonl").is_file()})
    began = time.monotonic()
    with open(workspace / f"{cell.name}.txt", "a", encoding="utf-8") as log, output_into(log):
        run_config("iterative-merge", config)
    gc.collect()
    gc.freeze()  # libraries by now: the end of every trainer would go through them again
    print(f"{cell.name}: {time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def output_into(stream: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


def run_cells(cells: Sequence[Cell], workspace: Path) -> None:
    for cell in cells:
        try:
            run_cell(cell, workspace)
        except Interrupted as error:
            raise SystemExit(f"{cell.name}: {error.message}; the same command goes on") from None
        except MeldkitError as error:  # a result too: the table shows the gap
            print(f"{cell.name}: {error.message}", flush=True)


def run_in_processes(cells: Sequence[Cell], arguments: argparse.Namespace) -> None:
    """Share the cells out. One thread each: two processes do more than one with two threads, at so small batches, and
    the results do not depend on how many processes there are."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--workspace", str(arguments.workspace)]
    command += ["--model", OPTIONS["model"], "--epochs", str(OPTIONS["max_epochs"]), "--cells"]
    workers = [
        subprocess.Popen(
            [*command, ",".join(cell.name for cell in cells[number :: arguments.processes])],
            env=environment,
            start_new_session=True,  # Ctrl-C comes from here, once
        )
        for number in range(min(arguments.processes, len(cells)))
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        statuses = [worker.wait() for worker in workers]
    except KeyboardInterrupt:  # they finish a step and commit
        for worker in workers:
            worker.terminate()
        statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise SystemExit("a process has ended early; the same command goes on")


# --- comparing


def outcomes_of(cells: Sequence[Cell], workspace: Path, arm: str, locale: str) -> list[Any] | None:
    """Row outcomes of an arm of one locale, seed by seed; None where a run has not measured it."""
    from toolkit.rounds.outcome_files import OutcomeFiles

    found = [OutcomeFiles(workspace / cell.name / "comparison").read(arm, locale) for cell in cells]
    return None if any(outcomes is None for outcomes in found) else found


def best_sources(seeds: Sequence[int], workspace: Path, locale: str) -> tuple[list[Any], list[str]]:
    """The best other locale's model without merges on the rows of ``locale``, seed by seed, and which one it is."""
    from toolkit.rounds.comparison import best_source
    from toolkit.rounds.outcome_files import OWN_TRAINING, OutcomeFiles

    measured, names = [], []
    for seed in seeds:
        files = OutcomeFiles(workspace / Cell(seed).name / "comparison")
        read = {
            other: files.read(OWN_TRAINING, other, rows_of=locale) for other in LOCALES if other != locale
        }
        there = {other: outcomes for other, outcomes in read.items() if outcomes is not None}
        name = best_source(there, "accuracy")
        assert name is not None, f"{Cell(seed).name} has measured no other locale on {locale}"
        measured.append(there[name])
        names.append(name)
    return measured, names


def arms_of(cells: Sequence[Cell], workspace: Path) -> dict[str, dict[str, list[Any]]]:
    """outcomes[locale][arm], as ``compare`` takes them, of one way to merge."""
    seeds = [cell.seed for cell in cells]
    alone = [Cell(seed) for seed in seeds]
    found: dict[str, dict[str, list[Any]]] = {}
    for locale in LOCALES:
        arms = {
            "base": outcomes_of(alone, workspace, "base", locale),
            "own_training": outcomes_of(alone, workspace, "own_training", locale),
            "last_merge": outcomes_of(cells, workspace, "last_merge", locale),
            "best_source": best_sources(seeds, workspace, locale)[0],
            "iterative": outcomes_of(cells, workspace, "iterative", locale),
        }
        found[locale] = {arm: outcomes for arm, outcomes in arms.items() if outcomes is not None}
    return found


def compare_way(cells: Sequence[Cell], workspace: Path, num_samples: int) -> dict[str, Any]:
    """What one way to merge did: for every locale, and as means over all, the rich and the poor ones."""
    from toolkit.rounds.comparison import compare

    arms = arms_of(cells, workspace)
    compared = partial(compare, metric="accuracy", num_samples=num_samples, seed=0)
    whole = compared(arms)
    return {
        "seeds": [cell.seed for cell in cells],
        "locales": whole["participants"],
        "all": whole["overall"],
        "rich": compared({locale: arms[locale] for locale in RICH})["overall"],
        "low_resource": compared({locale: arms[locale] for locale in LOW})["overall"],
        "num_verdicts": whole["num_verdicts"],
        "gate": gate_counts(cells, workspace),
    }


def gate_counts(cells: Sequence[Cell], workspace: Path) -> dict[str, int]:
    from toolkit.iterative import TrainingStateManager

    verdicts = [
        verdict
        for cell in cells
        for merge in TrainingStateManager(workspace / cell.name).merges()
        for verdict in merge["gate"].values()
    ]
    return {name: verdicts.count(name) for name in ("accepted", "rejected")}


def check_no_merge(seeds: Sequence[int], workspace: Path) -> None:
    """The loop that never merges must have done what training alone does, bit for bit."""
    import numpy as np

    for seed in seeds:
        for locale in LOCALES:
            measured = [
                outcomes_of([Cell(seed)], workspace, arm, locale) for arm in ("own_training", "iterative")
            ]
            alone, in_loop = (outcomes[0].loss for outcomes in measured if outcomes is not None)
            assert np.array_equal(alone, in_loop), f"seed {seed}: {locale} differs"


def evaluate(workspace: Path, num_samples: int) -> dict[str, Any]:
    """Compare what is there: ways to merge of which every seed with a no-merge run is finished."""
    seeds = [seed for seed in SEEDS if is_finished(workspace / Cell(seed).name)]
    check_no_merge(seeds, workspace)
    ways: dict[str, Any] = {}
    for method, scope, gate in product(METHODS, SCOPES, (False, True)):
        done = [Cell(seed, method, scope, gate) for seed in seeds]
        done = [cell for cell in done if is_finished(workspace / cell.name)]
        if done:
            ways[f"{method}, {scope}{', gate' if gate else ''}"] = compare_way(done, workspace, num_samples)
    sources = {locale: best_sources(seeds, workspace, locale)[1] for locale in LOCALES} if seeds else {}
    return {"best_sources_by_seed": sources, "ways": ways}


# --- writing


def seconds_of(workspace: Path) -> dict[str, float]:
    """Time from the first to the last line of each run's journal: over all sessions, if there were several."""
    from datetime import datetime

    spans = {}
    for cell in all_cells():
        path = workspace / cell.name / "journal.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            first, last = (datetime.fromisoformat(json.loads(line)["time"]) for line in (lines[0], lines[-1]))
            spans[cell.name] = round((last - first).total_seconds(), 1)
    return spans


def result(workspace: Path, num_samples: int) -> dict[str, Any]:
    import torch

    spans = seconds_of(workspace)
    return {
        "command": "python bench/studies/iterative_merging.py",
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "locales": list(LOCALES),
        "low_resource": list(LOW),
        "num_rows": [NUM_RICH, NUM_LOW],
        "times_low": TIMES_LOW,
        "intents": INTENTS,
        "rows_per_intent": ROWS_PER_INTENT,
        "num_held_out": NUM_HELD_OUT,
        "options": OPTIONS | MERGES | {"fisher_dataset": FISHER},
        "seconds": {"sum": round(sum(spans.values()), 1), "by_cell": spans},
        **rounded(evaluate(workspace, num_samples)),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def chosen(names: str | None) -> list[Cell]:
    cells = {cell.name: cell for cell in all_cells()}
    if names is None:
        return list(cells.values())
    if unknown := [name for name in names.split(",") if name not in cells]:
        raise SystemExit(f"no such cell: {', '.join(unknown)}; there are {', '.join(cells)}")
    return [cells[name] for name in names.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, default=Path("runs/iterative_merging"))
    parser.add_argument("--cells", help="run only these, by name, in this process, and compare nothing")
    parser.add_argument("--processes", type=int, default=2, help="that run cells beside each other")
    parser.add_argument("--compare-only", action="store_true", help="run nothing")
    parser.add_argument("--bootstrap-samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="folder for the two files; without it they are printed")
    parser.add_argument("--model", default=OPTIONS["model"], help="another one, to try the study out")
    parser.add_argument("--epochs", type=int, default=OPTIONS["max_epochs"])
    arguments = parser.parse_args()
    OPTIONS.update(model=arguments.model, max_epochs=arguments.epochs)
    arguments.workspace = arguments.workspace.resolve()
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    if not (arguments.workspace / "data").is_dir():
        make_data(arguments.workspace)
    if arguments.cells is not None:
        run_cells(chosen(arguments.cells), arguments.workspace)
        return
    if not arguments.compare_only:
        left = [cell for cell in all_cells() if not is_finished(arguments.workspace / cell.name)]
        run_in_processes(left, arguments)
    found = result(arguments.workspace, arguments.bootstrap_samples)
    if arguments.out is None:
        print(as_markdown(found))
        return
    write_json(arguments.out / "iterative_merging.json", found)
    write_text(arguments.out / "iterative_merging.md", as_markdown(found))


if __name__ == "__main__":
    main()
