"""Help texts, written from the schema: every option with its default, its type and its docstring, in
groups."""

import textwrap
from importlib import metadata
from typing import Any

from toolkit.cli.terminal import BOLD, DIM, styled, width
from toolkit.config.command_line import REQUEST_HELP
from toolkit.config.options import Options
from toolkit.config.recipes import RECIPES
from toolkit.config.schema import Option, options_of
from toolkit.config.shipped import shipped_file

COMMANDS: dict[str, str] = {
    "train": "Train with a recipe.",
    "data": "Check, preview and split data; list formats; make sample data.",
    "models": "Make sample models.",
    "completion": "Print the completion script of a shell.",
}
DATA_COMMANDS: dict[str, str] = {
    "check": "Look for what would spoil a training: empty or cut answers, duplicates, leaks between splits.",
    "preview": "Print rows as the model sees them, with the trained tokens in colour.",
    "split": "Split data into training and held-out files, or among clients.",
    "formats": "List the formats of rows that are recognised.",
    "samples": "Make sample data sets from packages.",
}
SHELLS: dict[str, str] = {"bash": "for bash", "zsh": "for zsh", "tcsh": "for tcsh"}


def version() -> str:
    return f"meldkit {metadata.version('meldkit')}"


def main_help() -> str:
    summary = metadata.metadata("meldkit")["Summary"]
    return _command_help(
        "meldkit COMMAND ...",
        summary or "",
        COMMANDS,
        footer=[
            "meldkit COMMAND --help tells more about a command; meldkit --version prints the version.",
            "Exit status: 0 done; 2 the input is wrong and nothing was started; 1 the run failed; "
            "75 interrupted, and --resume goes on.",
        ],
    )


def train_help() -> str:
    recipes = {name: (config.__doc__ or "").splitlines()[0] for name, config in RECIPES.items()}
    footer = [
        "meldkit train RECIPE --help lists the options of a recipe.",
        "Every recipe also runs as python recipes/NAME.py ... and accelerate launch recipes/NAME.py ...",
    ]
    return _command_help(
        "meldkit train RECIPE [OPTION ...]", "Train with a recipe.", recipes, footer=footer, what="Recipes"
    )


def data_help() -> str:
    footer = ["meldkit data COMMAND --help tells more about a command."]
    return _command_help("meldkit data COMMAND ...", COMMANDS["data"], DATA_COMMANDS, footer=footer)


def completion_help() -> str:
    footer = [
        "bash: meldkit completion bash > ~/.local/share/bash-completion/completions/meldkit",
        "zsh: meldkit completion zsh > DIR/_meldkit, where DIR is in $fpath",
        "tcsh: meldkit completion tcsh > ~/.meldkit.tcsh, and source it in ~/.tcshrc",
    ]
    return _command_help(
        "meldkit completion SHELL", COMMANDS["completion"], SHELLS, footer=footer, what="Shells"
    )


def recipe_help(recipe: str, config_class: type[Options]) -> str:
    """Return the help of a recipe, wrapped to the width of the terminal."""
    lines = [*_usage(f"meldkit train {recipe} [--config FILE] [--OPTION VALUE ...]"), ""]
    lines += textwrap.wrap(" ".join((config_class.__doc__ or "").split()), width())
    file = shipped_file(recipe)
    if file is not None:
        text = (
            f"Without --config, --model and --data the values come from {file.name}, the file that comes "
            f"with the recipe; --config {recipe} takes them with other flags too."
        )
        lines += ["", *textwrap.wrap(text, width())]
    lines += _options_lines(config_class)
    lines += ["", styled("Besides:", BOLD)]
    for signature, text in REQUEST_HELP.items():
        lines += _option_lines(signature, text)
    return "\n".join(lines)


def options_help(usage: str, config_class: type[Options]) -> str:
    """Return the help of a command whose options are those of ``config_class``."""
    lines = [*_usage(usage), "", *textwrap.wrap(" ".join((config_class.__doc__ or "").split()), width())]
    return "\n".join([*lines, *_options_lines(config_class, own_title="Options")])


def _options_lines(config_class: type[Options], *, own_title: str = "Recipe") -> list[str]:
    lines: list[str] = []
    group = None
    for option in options_of(config_class).values():
        if option.group != group:
            group = option.group
            lines += ["", styled(f"{own_title if group == 'Recipe' else group}:", BOLD)]
        lines += _option_lines(_signature(option), _description(option))
    return lines


def _command_help(
    usage: str, summary: str, commands: dict[str, str], *, footer: list[str], what: str = "Commands"
) -> str:
    lines = [*_usage(usage), "", *textwrap.wrap(summary, width()), "", styled(f"{what}:", BOLD)]
    column = max(len(name) for name in commands) + 4
    for name, text in commands.items():
        wrapped = textwrap.wrap(text, width() - column - 2)
        lines.append(f"  {name:<{column}}{wrapped[0]}")
        lines += [" " * (column + 2) + line for line in wrapped[1:]]
    for paragraph in footer:
        lines += (
            ["", *textwrap.wrap(paragraph, width())]
            if paragraph is footer[0]
            else textwrap.wrap(paragraph, width())
        )
    return "\n".join(lines)


def _usage(text: str) -> list[str]:
    return textwrap.wrap(f"usage: {text}", width(), subsequent_indent=" " * 7)


def _signature(option: Option) -> str:
    if option.kind == "switch":
        return f"--[no-]{option.flag[2:]}"
    if option.kind == "list" and not option.splits_commas:
        return f"{option.flag} TEXT"
    return f"{option.flag} {option.metavar}"


def _description(option: Option) -> str:
    choices = (
        f" One or more of {', '.join(option.choices)}." if option.kind == "list" and option.choices else ""
    )
    return f"{option.help}{choices} {_default(option)}".strip()


def _default(option: Option) -> str:
    if option.is_required:
        return "[required]"
    if option.default is None or option.default in ([], {}, ""):
        return ""
    return f"[{_shown(option.default)}]"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(str(element) for element in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _option_lines(signature: str, text: str) -> list[str]:
    """The signature, then the text beside it, or below it when the signature is long."""
    column = 30 if width() >= 72 else 8
    wrapped = textwrap.wrap(
        text, max(20, width() - column), break_long_words=False, break_on_hyphens=False
    ) or [""]
    if wrapped[-1].startswith("[") or " [" in wrapped[-1]:
        start = wrapped[-1].rindex("[")
        wrapped[-1] = wrapped[-1][:start] + styled(wrapped[-1][start:], DIM)
    head = f"  {signature}"
    if len(head) <= column - 2:
        return [f"{head:<{column}}{wrapped[0]}", *(" " * column + line for line in wrapped[1:])]
    return [*_wrapped_signature(head), *(" " * column + line for line in wrapped)]


def _wrapped_signature(head: str) -> list[str]:
    """Break a long list of choices after a bar."""
    lines = [""]
    for part in head.replace("|", "|\0").split("\0"):
        if len(lines[-1]) + len(part) > width() and lines[-1]:
            lines.append(" " * 6)
        lines[-1] += part
    return lines
