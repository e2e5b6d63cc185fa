"""Start a recipe: configuration, launch plan, then this process or the processes that a launcher starts."""

import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit.cli.failures import guarded, stop_on_sigterm
from toolkit.cli.files import check_files
from toolkit.cli.samples import check_samples, make_samples
from toolkit.config.load import Loaded, load
from toolkit.config.recipes import RECIPES
from toolkit.config.shipped import shipped_file
from toolkit.durable import write_json
from toolkit.errors import RunDirectoryError
from toolkit.terminal import BOLD, out, styled

CONFIG_NAME = "experiment_config.json"
RUNS = {
    "centralized-hf": "toolkit.rounds.centralized",
    "centralized-unsloth": "toolkit.rounds.centralized",
    "iterative-merge": "toolkit.rounds.iterative",
}
"""Where each recipe is run: a module with ``run(config, plan) -> exit status``, imported once it begins."""
ON_KILL = {"iterative-merge": ("toolkit.rounds.killed_workers", "GoOn")}
"""What decides, in the launcher's process, whether a run goes on after one of its ranks was killed."""
OPTION_RULES = {"iterative-merge": "toolkit.rounds.option_rules"}
"""A module that adds rules to those between options, for a recipe that has registries."""
HELP_FLAGS = {"-h", "--help"}
OnTrainer = Callable[[Any], None]


def run_recipe(recipe: str, argv: Sequence[str]) -> int:
    """Run a recipe with the arguments after its name and return the exit status.

    The same whether ``meldkit train``, ``python recipes/NAME.py`` or a launcher calls it: the launch plan
    decides, and a process that a launcher has started never starts another one.
    """
    argv = list(argv)
    if HELP_FLAGS.intersection(argv):
        from toolkit.config.option_help import recipe_help

        return guarded(lambda: _print(recipe_help(recipe, RECIPES[recipe])), debug=False)
    starter = _Starter(recipe, argv)
    debug = "--debug" in argv
    stop_on_sigterm()  # a run that has begun installs a handler that saves first
    return guarded(starter.start, debug=debug, log=starter.log_file, resume_hint=starter.resume_hint)


def run_config(recipe: str, config: Any, *, on_trainer: OnTrainer | None = None) -> int:
    """Run a recipe with a configuration made in Python; returns the exit status.

    With several processes, or DeepSpeed, they are launched with the configuration in a file.

    Args:
        on_trainer: called with the :class:`~toolkit.training.contract.ParticipantTrainer` before its first step, of
            a centralized recipe in this process.

    Raises:
        MeldkitError: of the kinds in ``toolkit.errors``; the command line prints it instead.
    """
    if recipe in OPTION_RULES:
        importlib.import_module(OPTION_RULES[recipe])
    _check_inputs(config, recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        write_json(path, config.model_dump(mode="json", exclude={"resume"}))
        argv = ["--config", str(path), *(["--resume"] if config.resume else [])]
        return _run(recipe, config, argv, on_trainer=on_trainer)


def _check_inputs(config: Any, recipe: str) -> None:
    """Raise for what is not there (files, samples, languages, trackers), while nothing has begun."""
    from toolkit.reporting.trackers import missing_trackers

    check_files(config, recipe)
    if getattr(config, "weighting", None) == "similarity":
        from toolkit.rounds.option_rules import check_languages

        check_languages(config)
    check_samples(config)
    if config.backend == "unsloth":
        from toolkit.training.unsloth_process import check_installation

        check_installation()
    for error in missing_trackers(config):
        raise error


def _run(
    recipe: str,
    config: Any,
    argv: list[str],
    on_begin: Callable[[], None] = lambda: None,
    on_trainer: OnTrainer | None = None,
) -> int:
    from toolkit.launch.plan import is_launched, resolve_plan

    plan = resolve_plan(config)
    make_samples(config)
    if plan.needs_launcher and not is_launched(os.environ):
        from toolkit.launch.launcher import launch

        on_kill = None
        if recipe in ON_KILL:
            module, name = ON_KILL[recipe]
            on_kill = getattr(importlib.import_module(module), name)(config, argv)
        return launch(plan, recipe, argv, on_kill)
    # Read by torch, accelerate and DeepSpeed while they are imported.
    os.environ.update(plan.environment())
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a run sends nothing anywhere; TRL would
    on_begin()
    from toolkit.reporting.libraries import quiet_libraries

    with quiet_libraries(config.log_level):
        if config.backend == "unsloth":
            from toolkit.training.unsloth_process import enter_unsloth

            enter_unsloth(plan.device)
        keywords = {} if on_trainer is None else {"on_trainer": on_trainer}
        return importlib.import_module(RUNS[recipe]).run(config, plan, **keywords)


class _Starter:
    """One start of a recipe. What is known when an error strikes is kept for the message about it."""

    def __init__(self, recipe: str, argv: list[str]) -> None:
        self.recipe = recipe
        self.argv = argv
        self.loaded: Loaded[Any] | None = None
        self.has_begun = False

    def start(self) -> int:
        if self.recipe in OPTION_RULES:
            importlib.import_module(OPTION_RULES[self.recipe])
        self.loaded = loaded = load(RECIPES[self.recipe], self.argv, default_file=shipped_file(self.recipe))
        request = loaded.request
        is_main = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
        if request.save_config is not None and is_main:
            self._save(loaded)
        if request.print_config:
            return self._print_config(loaded) if is_main else 0
        if request.dry_run:
            return self._dry_run(loaded) if is_main else 0
        _check_inputs(loaded.config, self.recipe)
        return _run(self.recipe, loaded.config, self.argv, self._begin)

    def _begin(self) -> None:
        self.has_begun = True

    def _save(self, loaded: Loaded[Any]) -> None:
        """Write the file of --save-config.

        Without a path the file is the run directory's own, which a run that is really started writes itself.
        """
        from toolkit.config.render import save

        asked = loaded.request.save_config
        if asked:
            save(loaded, Path(asked))
            return
        if not (loaded.request.dry_run or loaded.request.print_config):
            return
        output_dir = Path(loaded.config.output_dir)
        if (output_dir / "journal.jsonl").exists():
            raise RunDirectoryError(
                f"--save-config: {output_dir} holds a run, and its {CONFIG_NAME} describes that run",
                hint="give --save-config a file name, or another --output-dir",
            )
        save(loaded, output_dir / CONFIG_NAME)

    def _print_config(self, loaded: Loaded[Any]) -> int:
        from toolkit.config.render import as_yaml

        sys.stdout.write(as_yaml(loaded))
        return 0

    def _dry_run(self, loaded: Loaded[Any]) -> int:
        from toolkit.config.render import as_yaml
        from toolkit.launch.launcher import shell_line
        from toolkit.launch.plan import resolve_plan

        sys.stdout.write(as_yaml(loaded))
        plan = resolve_plan(loaded.config)
        out("\n" + styled("# Launch plan", BOLD))
        for name, value in plan.as_dict().items():
            out(f"#   {name}: {_shown(value)}")
        for note in plan.notes:
            out(f"#   - {note}")
        out("\n" + styled("# Command", BOLD))
        rest = [word for word in self.argv if word.replace("_", "-").split("=")[0] != "--dry-run"]
        module = ["toolkit", "train", self.recipe, *rest]
        if plan.needs_launcher:
            out(f"#   {shell_line(plan, module)}")
        else:
            out(f"#   {shlex.join(['meldkit', *module[1:]])}")
        _check_inputs(loaded.config, self.recipe)
        out("\n# Dry run: nothing was started.")
        return 0

    def log_file(self) -> Path | None:
        """The log of the run, once it has one."""
        if self.loaded is None or not self.has_begun:
            return None
        path = Path(self.loaded.config.output_dir) / "training.log"
        return path if path.is_file() else None

    def resume_hint(self) -> str | None:
        """The command that goes on with this run, once there is something to go on with."""
        if self.loaded is None or not self.has_begun:
            return None
        output_dir = str(self.loaded.config.output_dir)
        if not (Path(output_dir) / CONFIG_NAME).is_file():
            return "nothing has been trained yet; start it again"
        return shlex.join(["meldkit", "train", self.recipe, "--resume", "--output-dir", output_dir])


def _print(text: str) -> int:
    out(text)
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(element) for element in value) or "none"
    return "none" if value is None else str(value)
