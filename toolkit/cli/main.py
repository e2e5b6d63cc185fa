"""`meldkit`: find the command and hand it its arguments. What a command needs is imported when it is
called."""

import gc
import os
from collections.abc import Callable

from toolkit.cli.failures import INPUT_WRONG, guarded, stop_on_sigterm
from toolkit.config.names import did_you_mean
from toolkit.terminal import err, out

HELP_WORDS = ("-h", "--help", "help")
Command = Callable[[list[str]], int]
# Read when pydantic and numpy are imported: no search through all packages for plugins of pydantic, and threads of BLAS
# that sleep until there is work rather than spin on the cores that read the models.
QUICK_IMPORTS = {"PYDANTIC_DISABLE_PLUGINS": "__all__", "OPENBLAS_THREAD_TIMEOUT": "4"}
# New objects between two searches for garbage. Importing and planning make many, and none is garbage.
OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main(argv: list[str]) -> int:
    """Run the command line ``meldkit ARGV`` and return its exit status."""
    debug = argv[:1] == ["--debug"]
    argv = argv[1:] if debug else argv
    return guarded(lambda: _main(argv, debug=debug), debug=debug or "--debug" in argv)


def _main(argv: list[str], *, debug: bool) -> int:
    from toolkit.cli import help as texts

    if not argv or argv[0] in HELP_WORDS:
        out(texts.main_help())
        return 0 if argv else INPUT_WRONG
    if argv[0] in ("--version", "-V", "version"):
        out(texts.version())
        return 0
    commands: dict[str, Command] = {
        "train": lambda rest: _train([*rest, "--debug"] if debug and rest else rest),
        "merge": _merge,
        "merge-locales": _merge_locales,
        "compare-seeds": _compare_seeds,
        "fisher": _fisher,
        "data": _data,
        "models": _models,
        "bench": _bench,
        "completion": _completion,
    }
    command = commands.get(argv[0])
    if command is None:
        return _unknown("command", argv[0], list(commands), "meldkit --help")
    return command(argv[1:])


def _train(argv: list[str]) -> int:
    from toolkit.cli import help as texts
    from toolkit.cli.train import run_recipe
    from toolkit.config.recipes import RECIPES

    if not argv or argv[0] in HELP_WORDS:
        out(texts.train_help())
        return 0 if argv else INPUT_WRONG
    recipe = argv[0].replace("_", "-")
    if recipe not in RECIPES:
        return _unknown("recipe", argv[0], list(RECIPES), "meldkit train --help")
    return run_recipe(recipe, argv[1:])


def _merge(argv: list[str]) -> int:
    for name, value in QUICK_IMPORTS.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    from toolkit.merging.commands import merge

    return merge(argv)


def _merge_locales(argv: list[str]) -> int:
    from toolkit.rounds.merge_locales import merge_locales

    return merge_locales(argv)


def _compare_seeds(argv: list[str]) -> int:
    from toolkit.rounds.compare_seeds import compare_seeds

    return compare_seeds(argv)


def _fisher(argv: list[str]) -> int:
    from toolkit.merging.fisher.commands import fisher

    return fisher(argv)


def _data(argv: list[str]) -> int:
    from toolkit.cli import help as texts

    if not argv or argv[0] in HELP_WORDS:
        out(texts.data_help())
        return 0 if argv else INPUT_WRONG
    command, rest = argv[0], argv[1:]
    if command == "samples":
        from toolkit.data.samples.commands import samples

        return samples(rest)
    if command not in texts.DATA_COMMANDS:
        return _unknown("command", command, list(texts.DATA_COMMANDS), "meldkit data --help")
    from toolkit.data import commands

    return getattr(commands, command)(rest)


def _models(argv: list[str]) -> int:
    from toolkit.modeling.samples.commands import models

    return models(argv)


def _bench(argv: list[str]) -> int:
    from toolkit.benchmarks.commands import bench
    from toolkit.cli import help as texts

    if not argv or argv[0] in HELP_WORDS:
        out(texts.bench_help())
        return 0 if argv else INPUT_WRONG
    stop_on_sigterm()
    return bench(argv)


def _completion(argv: list[str]) -> int:
    from toolkit.cli import help as texts

    if not argv or argv[0] in HELP_WORDS:
        out(texts.completion_help())
        return 0 if argv else INPUT_WRONG
    if argv[0] not in texts.SHELLS:
        return _unknown("shell", argv[0], list(texts.SHELLS), "meldkit completion --help")
    from toolkit.cli.completion import script

    out(script(argv[0]))
    return 0


def _unknown(what: str, word: str, valid: list[str], help_command: str) -> int:
    kind = "option" if word.startswith("-") else what
    err(f"error: unknown {kind} '{word}'{did_you_mean(word, valid)}")
    err(f"  hint: {help_command} lists what there is")
    return INPUT_WRONG
