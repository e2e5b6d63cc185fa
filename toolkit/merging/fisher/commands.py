"""``meldkit fisher``: takes its arguments and returns the exit status."""

import sys
import time

from toolkit.config.fisher_command import FisherConfig
from toolkit.config.load import load_for_command
from toolkit.config.option_help import options_help
from toolkit.terminal import err, out

HELP_FLAGS = {"-h", "--help", "help"}
USAGE = "meldkit fisher --model MODEL [--adapter FOLDER] --data DATA --out FILE [--OPTION VALUE ...]"
WRONG_INPUT = 2


def fisher(argv: list[str]) -> int:
    """Estimate Fisher information and write it."""
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(USAGE, FisherConfig))
        return 0 if argv else WRONG_INPUT
    config = load_for_command(FisherConfig, argv).config
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from toolkit.merging.fisher.from_folder import fisher_by_options

    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("Reading model and data", total=None)

        def show(num_done: int, num_total: int) -> None:
            bar.update(task, description="Examples", completed=num_done, total=num_total)

        estimated = fisher_by_options(config, show)
        bar.update(task, description="Writing", total=None)
        estimated.save(config.out)
    num_parameters = sum(tensor.numel() for tensor in estimated.tensors.values())
    out(
        f"{config.out}  {estimated.kind} Fisher information of {num_parameters:,} parameters over "
        f"{estimated.num_examples:,} examples, norm {estimated.global_norm:.3g}, "
        f"{time.monotonic() - began:.1f} s"
    )
    if estimated.slow_parameters:
        names = ", ".join(estimated.slow_parameters[:3])
        err(
            f"one backward pass an example was needed for {len(estimated.slow_parameters)} tensors: {names}, ..."
        )
    return 0
