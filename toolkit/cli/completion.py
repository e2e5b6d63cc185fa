"""Shell completion: the command line as an argparse parser, from which shtab writes the script."""

import argparse

import shtab

from toolkit.cli.help import COMMANDS, DATA_COMMANDS, SHELLS
from toolkit.config.options import Options
from toolkit.config.recipes import RECIPES
from toolkit.config.schema import Option, options_of

SOURCE_OPTIONS = {"data", "eval_data", "model", "tokenizer"}


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
    data = commands.add_parser("data", help=COMMANDS["data"]).add_subparsers(dest="data_command")
    for name, text in DATA_COMMANDS.items():
        _add_file(data.add_parser(name, help=text))
    models = commands.add_parser("models", help=COMMANDS["models"])
    _completed(models.add_argument("--out", help="Folder of the model."), shtab.DIRECTORY)
    completion = commands.add_parser("completion", help=COMMANDS["completion"])
    completion.add_argument("shell", choices=list(SHELLS))
    return top


def _completed(action: argparse.Action, how: object) -> None:
    """Say with what an argument's value is completed: shtab reads an attribute that argparse does not declare."""
    vars(action)["complete"] = how


def _add_file(command: argparse.ArgumentParser) -> None:
    _completed(command.add_argument("file", nargs="*"), shtab.FILE)


def _add_recipe(recipe: argparse.ArgumentParser, config_class: type[Options]) -> None:
    for option in options_of(config_class).values():
        _add_option(recipe, option)
    for flag in ("--config", "--config-file", "--save-config"):
        _completed(recipe.add_argument(flag, nargs="?", help=_one_line("A YAML or JSON file.")), shtab.FILE)
    for flag in ("--dry-run", "--print-config", "--debug"):
        recipe.add_argument(flag, action="store_true")


def _add_option(recipe: argparse.ArgumentParser, option: Option) -> None:
    text = _one_line(option.help)
    if option.kind == "switch":
        recipe.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = list(option.choices) if option.choices else None
    action = recipe.add_argument(option.flag, choices=choices, help=text)
    if option.name == "output_dir" or option.name.endswith("_cache"):
        _completed(action, shtab.DIRECTORY)
    elif option.kind == "path" or option.name in SOURCE_OPTIONS:
        _completed(action, shtab.FILE)


def _one_line(text: str) -> str:
    """The first sentence; argparse formats it, so a percent sign is doubled."""
    return text.split(". ")[0].rstrip(".").replace("%", "%%")
