"""Help texts of the commands. The options of a recipe are in toolkit/config/option_help.py."""

import textwrap

import toolkit
from toolkit.terminal import BOLD, styled, usage_lines, width

COMMANDS: dict[str, str] = {
    "train": "Train with a recipe.",
    "merge": "Merge models, or adapters, into one.",
    "merge-locales": "Merge models of locales into one for a target language.",
    "compare-seeds": "Tell over several runs of one recipe whether merging helped.",
    "fisher": "Estimate a model's Fisher information, for merges that weigh by it.",
    "data": "Check, preview and split data; list formats; make sample data.",
    "models": "Make sample models.",
    "bench": "Compare ways to train: speed, memory, loss; compare results.",
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
    from importlib import metadata

    return f"meldkit {metadata.version('meldkit')}"


def main_help() -> str:
    return _command_help(
        "meldkit COMMAND ...",
        toolkit.__doc__ or "",
        COMMANDS,
        footer=[
            "meldkit COMMAND --help tells more about a command; meldkit --version prints the version.",
            "Exit status: 0 done; 2 the input is wrong and nothing was started; 1 the run failed; "
            "75 interrupted, and --resume goes on.",
        ],
    )


def train_help() -> str:
    from toolkit.config.recipes import RECIPES

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


def bench_help() -> str:
    from toolkit.benchmarks.commands import COMMANDS as BENCH_COMMANDS

    footer = ["meldkit bench COMMAND --help tells more about a command."]
    return _command_help("meldkit bench COMMAND ...", COMMANDS["bench"], BENCH_COMMANDS, footer=footer)


def completion_help() -> str:
    footer = [
        "bash: meldkit completion bash > ~/.local/share/bash-completion/completions/meldkit",
        "zsh: meldkit completion zsh > DIR/_meldkit, where DIR is in $fpath",
        "tcsh: meldkit completion tcsh > ~/.meldkit.tcsh, and source it in ~/.tcshrc",
    ]
    return _command_help(
        "meldkit completion SHELL", COMMANDS["completion"], SHELLS, footer=footer, what="Shells"
    )


def _command_help(
    usage: str, summary: str, commands: dict[str, str], *, footer: list[str], what: str = "Commands"
) -> str:
    lines = [*usage_lines(usage), "", *textwrap.wrap(summary, width()), "", styled(f"{what}:", BOLD)]
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
