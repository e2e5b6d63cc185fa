"""``meldkit data check | preview | split | formats``: each takes its arguments and returns the exit
status."""

import json
import sys
from typing import Any, TypeVar

from toolkit.config.data_commands import DataCheckConfig, PreviewConfig, SplitConfig
from toolkit.config.load import load_for_command
from toolkit.config.option_help import options_help
from toolkit.config.options import Options
from toolkit.errors import DataError, InputError
from toolkit.terminal import out

ConfigT = TypeVar("ConfigT", bound=Options)
HELP_FLAGS = {"-h", "--help", "help"}
PROBLEMS_FOUND = 2
WRONG_INPUT = 2


def check(argv: list[str]) -> int:
    """Check data: tables, or JSON with --json. 0, or 2 when there are problems."""
    argv = ["--output=json" if word == "--json" else word for word in argv]
    config = _load("check --data DATA [--model MODEL] [--json]", DataCheckConfig, argv)
    if isinstance(config, int):
        return config
    report = check_report(config)
    if config.output == "json":
        out(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        from toolkit.data.show import show_report

        show_report(report, _console())
    return PROBLEMS_FOUND if report.problems and not config.skip_data_check else 0


def check_report(config: DataCheckConfig) -> Any:
    """The :class:`~toolkit.data.check.CheckReport` of ``config``; without a tokenizer of rows and characters
    only."""
    from toolkit.data.check import judge
    from toolkit.data.prepare import prepare, split_examples
    from toolkit.data.recognise import recognise
    from toolkit.data.selection import select_tables

    tokenizer = _tokenizer(config)
    if tokenizer is not None:
        return prepare(config, tokenizer, config.task, seed=config.seed, enforce=False).report
    train, evaluation = select_tables(config)
    layout = recognise(
        train, data_format=config.data_format, data_mapping=config.data_mapping, task=config.task
    )
    report = split_examples(config, config.task, config.seed, layout, train, evaluation)[2]
    judge(report, config)
    report.notes.append("without --model or --tokenizer only rows and characters are looked at")
    return report


def preview(argv: list[str]) -> int:
    """Print rows with their trained tokens."""
    config = _load("preview --data DATA --model MODEL [--num-rows N]", PreviewConfig, argv)
    if isinstance(config, int):
        return config
    tokenizer = _tokenizer(config)
    if tokenizer is None:
        raise InputError("a preview shows tokens: --model or --tokenizer is needed")
    from toolkit.data.encode import Encoder
    from toolkit.data.prepare import split_examples
    from toolkit.data.recognise import recognise
    from toolkit.data.render import Renderer
    from toolkit.data.selection import select_tables
    from toolkit.data.show import show_row

    train, evaluation = select_tables(config)
    task = config.task
    layout = recognise(train, data_format=config.data_format, data_mapping=config.data_mapping, task=task)
    splits = split_examples(config, task, config.seed, layout, train, evaluation)
    chosen = splits[0] if config.show == "train" else splits[1]
    if chosen is None:
        raise DataError(
            f"{train.source} has no held-out rows", hint="give --eval-data, --eval-split or --eval-fraction"
        )
    first = config.first_row - 1
    if first >= len(chosen.examples):
        raise DataError(
            f"--first-row {config.first_row}: there are {len(chosen.examples)} {config.show} rows"
        )
    examples = chosen.examples[first : first + config.num_rows]
    console = _console()
    if task == "sequence-classification":
        _preview_labelled(examples, first, tokenizer, config, chosen, console)
        return 0
    renderer = Renderer(tokenizer, config.loss_on, chosen.where)
    shown = 0
    for row in Encoder(tokenizer).encode(renderer.render(examples, first)):
        show_row(row, tokenizer, console, title=chosen.where(row.index), max_length=config.max_length)
        shown += 1
    if not shown:
        out(f"none of the {len(examples)} rows has an answer to train")
    return 0


def _preview_labelled(
    examples: Any, first: int, tokenizer: Any, config: Any, chosen: Any, console: Any
) -> None:
    import numpy as np

    from toolkit.data.encode import Encoded
    from toolkit.data.show import show_row

    for number, example in enumerate(examples, first):
        ids = np.asarray(tokenizer(example.text).input_ids, dtype=np.int32)
        row = Encoded(ids, np.zeros(len(ids), dtype=bool), number)
        title = f"{chosen.where(number)}: label {example.label}"
        show_row(row, tokenizer, console, title=title, max_length=config.max_length)


def split(argv: list[str]) -> int:
    """Split data into files."""
    config = _load(
        "split --data DATA --out FOLDER [--fractions 0.8,0.1,0.1 | --clients N]", SplitConfig, argv
    )
    if isinstance(config, int):
        return config
    from toolkit.data.split import split_data

    written = split_data(config)
    total = sum(written.values())
    for path, num_rows in written.items():
        out(f"{path}  {num_rows:,} rows ({100 * num_rows / total:.1f} %)")
    return 0


def formats(argv: list[str]) -> int:
    """List the formats."""
    if argv and argv[0] not in HELP_FLAGS:
        raise InputError(f"meldkit data formats takes no arguments, and {argv[0]!r} was given")
    from toolkit.data.formats import FORMATS
    from toolkit.data.show import show_formats

    show_formats(list(FORMATS.values()), _console())
    return 0


def _load(usage: str, config_class: type[ConfigT], argv: list[str]) -> ConfigT | int:
    """The configuration, or the exit status after the help was printed: 0 where it was asked for."""
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(f"meldkit data {usage}", config_class))
        return 0 if argv else WRONG_INPUT
    return load_for_command(config_class, argv).config


def _tokenizer(config: Any) -> Any:
    if config.tokenizer is None and config.model is None:
        if config.chat_template is not None:
            raise InputError("--chat-template needs a tokenizer: give --model or --tokenizer")
        return None
    from toolkit.data.tokenizer import load_tokenizer

    return load_tokenizer(config)


def _console() -> Any:
    from rich.console import Console

    # A pipe gets whole lines: 100 columns are enough for every table, and rows wrap where they like.
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), highlight=False)
