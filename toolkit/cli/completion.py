"""Shell completion: the command line as an argparse parser, from which shtab writes the script."""

import argparse

import shtab

from toolkit.cli.help import COMMANDS, DATA_COMMANDS, SHELLS
from toolkit.config.data_commands import DataCheckConfig, PreviewConfig, SplitConfig
from toolkit.config.options import Options
from toolkit.config.recipes import RECIPES
from toolkit.config.schema import Option, options_of

SOURCE_OPTIONS = {"data", "eval_data", "model", "tokenizer", "models", "base", "fisher"}
FOLDER_OPTIONS = {"output_dir", "out", "adapter"}


def script(shell: str) -> str:
    """Return the completion script for ``bash``, ``zsh`` or ``tcsh``."""
    return shtab.complete(parser(), shell).rstrip("\n")


def parser() -> argparse.ArgumentParser:
    """Return a parser of the whole command line. It is used for completion only: load.py reads the
    arguments."""
    top = argparse.ArgumentParser(prog="meldkit", add_help=True)
    top.add_argument("--version", action="store_true", help="Print the version.")
    commands = top.add_subparsers(dest="command")
    train = commands.add_parser("train", help=COMMANDS["train"])
    recipes = train.add_subparsers(dest="recipe")
    for name, config_class in RECIPES.items():
        _add_recipe(recipes.add_parser(name, help=(config_class.__doc__ or "").splitlines()[0]), config_class)
    _add_merging(commands)
    data = commands.add_parser("data", help=COMMANDS["data"]).add_subparsers(dest="data_command")
    samples, options_of_data = _data_commands()
    for name, text in DATA_COMMANDS.items():
        command = data.add_parser(name, help=text)
        if name == "samples":
            command.add_argument("name", nargs="?", choices=samples)
        if name in options_of_data:
            _add_options(command, options_of_data[name])
        if name == "check":
            command.add_argument("--json", action="store_true", help="Short for --output json.")
    from toolkit.modeling.samples.catalog import MODELS
    from toolkit.modeling.samples.commands import ModelsConfig

    models = commands.add_parser("models", help=COMMANDS["models"])
    models.add_argument("name", nargs="?", choices=list(MODELS))
    _add_options(models, ModelsConfig)
    completion = commands.add_parser("completion", help=COMMANDS["completion"])
    completion.add_argument("shell", choices=list(SHELLS))
    return top


def _add_merging(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from toolkit.config.compare_seeds_command import CompareSeedsConfig
    from toolkit.config.fisher_command import FisherConfig
    from toolkit.config.merge_command import MergeConfig
    from toolkit.config.merge_locales_command import MergeLocalesConfig

    merge = commands.add_parser("merge", help=COMMANDS["merge"])
    _completed(merge.add_argument("recipe", nargs="?", help="A recipe file."), shtab.FILE)
    _completed(merge.add_argument("folder", nargs="?", help="The folder of the result."), shtab.DIRECTORY)
    _add_options(merge, MergeConfig)
    _add_options(commands.add_parser("merge-locales", help=COMMANDS["merge-locales"]), MergeLocalesConfig)
    seeds = commands.add_parser("compare-seeds", help=COMMANDS["compare-seeds"])
    _completed(seeds.add_argument("run", nargs="*", help="A run directory."), shtab.DIRECTORY)
    _add_options(seeds, CompareSeedsConfig)
    _add_options(commands.add_parser("fisher", help=COMMANDS["fisher"]), FisherConfig)


def _completed(action: argparse.Action, how: object) -> None:
    """Say with what an argument's value is completed: shtab reads an attribute that argparse does not declare."""
    vars(action)["complete"] = how


def _data_commands() -> tuple[list[str], dict[str, type[Options]]]:
    """The names of the sample data sets, and the options of each command on data."""
    from toolkit.data.samples.catalog import DATA
    from toolkit.data.samples.commands import SamplesConfig

    return list(DATA), {
        "check": DataCheckConfig,
        "preview": PreviewConfig,
        "split": SplitConfig,
        "samples": SamplesConfig,
    }


def _add_recipe(recipe: argparse.ArgumentParser, config_class: type[Options]) -> None:
    _add_options(recipe, config_class)
    for flag in ("--config", "--config-file", "--save-config"):
        _completed(recipe.add_argument(flag, nargs="?", help=_one_line("A YAML or JSON file.")), shtab.FILE)
    for flag in ("--dry-run", "--print-config", "--debug"):
        recipe.add_argument(flag, action="store_true")


def _add_options(command: argparse.ArgumentParser, config_class: type[Options]) -> None:
    for option in options_of(config_class).values():
        if option.name not in config_class.unavailable:
            _add_option(command, option)
    for name, synonym in config_class.synonyms.items():
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, action="store_true" if synonym.adds else "store")


def _add_option(recipe: argparse.ArgumentParser, option: Option) -> None:
    text = _one_line(option.help)
    if option.kind == "switch":
        recipe.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = list(option.choices) if option.choices else None
    action = recipe.add_argument(option.flag, choices=choices, help=text)
    if option.name in FOLDER_OPTIONS or option.name.endswith("_cache"):
        _completed(action, shtab.DIRECTORY)
    elif option.kind == "path" or option.name in SOURCE_OPTIONS:
        _completed(action, shtab.FILE)


def _one_line(text: str) -> str:
    """The first sentence; argparse formats it, so a percent sign is doubled."""
    return text.split(". ")[0].rstrip(".").replace("%", "%%")
