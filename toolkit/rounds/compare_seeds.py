"""``meldkit compare-seeds``: the comparison over several runs that differ in their seed."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from toolkit.config.compare_seeds_command import CompareSeedsConfig
from toolkit.config.load import load_for_command
from toolkit.config.option_help import options_help
from toolkit.durable import write_json
from toolkit.errors import InputError
from toolkit.rounds.journal import JOURNAL_NAME, Journal
from toolkit.rounds.run_directory import MAY_CHANGE_ON_RESUME
from toolkit.terminal import out

HELP_FLAGS = {"-h", "--help", "help"}
USAGE = "meldkit compare-seeds RUN RUN ... [--OPTION VALUE ...]"
WRONG_INPUT = 2
RECIPE = "iterative-merge"
_MAY_DIFFER = MAY_CHANGE_ON_RESUME | {"seed", "num_processes", "participants_per_step", "bootstrap_samples"}
"""Options of runs that are pooled: those that leave the numbers as they are, and the seed."""


def compare_seeds(argv: list[str]) -> int:
    """Pool runs, print the table; returns the exit status."""
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(USAGE, CompareSeedsConfig))
        return 0 if argv else WRONG_INPUT
    folders = list(takewhile(lambda word: not word.startswith("-"), argv))
    words = [f"--runs={json.dumps([folder])}" for folder in folders] + argv[len(folders) :]
    config = load_for_command(CompareSeedsConfig, words).config
    found = pooled(config)
    from toolkit.reporting.round_wording import comparison_lines
    from toolkit.rounds.comparison import comparison_record

    out("\n".join(comparison_lines(comparison_record(found))))
    if config.out is not None:
        write_json(config.out, found)
        out(f"\nWritten to {config.out}")
    return 0


def pooled(config: CompareSeedsConfig) -> dict[str, Any]:
    """The comparison over all runs, as :func:`toolkit.rounds.comparison.compare` returns it, and their ``seeds``.

    Raises:
        InputError: a folder without a finished run, runs that differ in more than the seed, or two of one seed.
    """
    journals = [_journal(folder) for folder in config.runs]
    options = [journal.records("created")[0]["config"] for journal in journals]
    _check_alike(config.runs, journals, options)
    from toolkit.rounds.comparison import compare, metric_of
    from toolkit.rounds.outcome_files import OutcomeFiles, arms_of

    asked, task = options[0]["metric"] if config.metric == "auto" else config.metric, options[0]["task"]
    metric, locales = metric_of(asked, task), options[0]["locales"]
    if metric != "loss" and task != "sequence-classification":
        raise InputError(f"--metric {metric} is for classifiers, and these are runs of {task}")
    of_runs = [arms_of(OutcomeFiles(folder / "comparison"), locales, metric) for folder in config.runs]
    measured: dict[str, dict[str, list[Any]]] = {}
    for locale in locales:
        arms = [outcomes.get(locale, {}) for outcomes, _ in of_runs]
        common = [arm for arm in arms[0] if all(arm in of_run for of_run in arms)]
        if common:
            measured[locale] = {
                arm: [outcome for of_run in arms for outcome in of_run[arm]] for arm in common
            }
    sources = {
        locale: "/".join(dict.fromkeys(of_run[locale] for _, of_run in of_runs if locale in of_run))
        for locale in measured
    }
    found = compare(
        measured,
        metric=metric,
        num_samples=config.bootstrap_samples,
        seed=config.seed,
        best_sources={locale: names for locale, names in sources.items() if names},
    )
    return found | {
        "seeds": [of_run["seed"] for of_run in options],
        "runs": [str(folder) for folder in config.runs],
    }


def _journal(folder: Path) -> Journal:
    if not (folder / JOURNAL_NAME).is_file():
        raise InputError(f"{folder} holds no run", hint=f"give run directories of {RECIPE}")
    journal = Journal(folder, writable=False)
    recipe = journal.records("created")[0]["recipe"]
    if recipe != RECIPE:
        raise InputError(f"{folder} holds a run of {recipe}, not of {RECIPE}")
    if not journal.records("finished"):
        raise InputError(
            f"the run in {folder} is not finished",
            hint=f"meldkit train {RECIPE} --resume --output-dir {folder}",
        )
    return journal


def _check_alike(
    folders: Sequence[Path], journals: Sequence[Journal], options: Sequence[dict[str, Any]]
) -> None:
    first, of_first = folders[0], options[0]
    facts = [journal.records("started")[-1] for journal in journals]
    for folder, of_run, found in zip(folders[1:], options[1:], facts[1:], strict=True):
        different = [
            f"  {name}: {of_first.get(name)!r} and {of_run.get(name)!r}"
            for name in sorted(of_first.keys() | of_run.keys())
            if name not in _MAY_DIFFER and of_first.get(name) != of_run.get(name)
        ]
        if different:
            raise InputError("\n".join([f"{first} and {folder} differ in more than their seed:", *different]))
        for name, what in (("data_fingerprint", "rows"), ("model_fingerprint", "base model")):
            if found[name] != facts[0][name]:
                raise InputError(f"{first} and {folder} have different {what}")
    seeds = [of_run["seed"] for of_run in options]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"runs of the same seed are no two runs: {', '.join(map(str, seeds))}")
