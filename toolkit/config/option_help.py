"""Help on options, written from the schema: each with its default, its type and its docstring, in groups."""

import textwrap
from typing import Any

from toolkit.config.command_line import REQUEST_HELP
from toolkit.config.options import Options, Synonym
from toolkit.config.schema import Option, options_of
from toolkit.config.shipped import shipped_file
from toolkit.terminal import BOLD, DIM, styled, usage_lines, width


def recipe_help(recipe: str, config_class: type[Options]) -> str:
    """Return the help of a recipe, wrapped to the width of the terminal."""
    lines = [*usage_lines(f"meldkit train {recipe} [--config FILE] [--OPTION VALUE ...]"), ""]
    lines += textwrap.wrap(" ".join((config_class.__doc__ or "").split()), width())
    file = shipped_file(recipe)
    if file is not None:
        required = [o.flag for o in options_of(config_class).values() if o.is_required]
        deciding = ["--config", *(flag for flag in required if flag != "--output-dir")]
        text = (
            f"Without {', '.join(deciding[:-1])} and {deciding[-1]} the values come from {file.name}, the file that "
            f"comes with the recipe; --config {recipe} takes them with other flags too."
        )
        lines += ["", *textwrap.wrap(text, width())]
    lines += _options_lines(config_class)
    lines += ["", styled("Besides:", BOLD)]
    for signature, text in REQUEST_HELP.items():
        lines += _option_lines(signature, text)
    return "\n".join(lines)


def options_help(usage: str, config_class: type[Options]) -> str:
    """Return the help of a command whose options are those of ``config_class``."""
    lines = [*usage_lines(usage), "", *textwrap.wrap(" ".join((config_class.__doc__ or "").split()), width())]
    return "\n".join([*lines, *_options_lines(config_class, own_title="Options")])


def _options_lines(config_class: type[Options], *, own_title: str = "Recipe") -> list[str]:
    lines: list[str] = []
    group = None
    options = options_of(config_class)
    for option in options.values():
        if option.name in config_class.unavailable:
            continue
        if option.group != group:
            group = option.group
            lines += ["", styled(f"{own_title if group == 'Recipe' else group}:", BOLD)]
        lines += _option_lines(_signature(option), _description(option))
        for name, synonym in config_class.synonyms.items():
            if synonym.option == option.name:
                lines += _option_lines(*_synonym(name, synonym, option))
    return lines


def _synonym(name: str, synonym: Synonym, option: Option) -> tuple[str, str]:
    flag = "--" + name.replace("_", "-")
    if synonym.adds:
        return flag, f"Adds {synonym.adds} to {option.flag}."
    return f"{flag} {option.metavar}", f"The same as {option.flag}."


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
