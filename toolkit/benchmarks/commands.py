"""``meldkit bench``: takes its arguments and returns the exit status."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile

from toolkit.config.bench_command import BenchCompareConfig, BenchTrainConfig
from toolkit.config.load import load_for_command
from toolkit.config.names import did_you_mean
from toolkit.config.option_help import options_help
from toolkit.errors import Interrupted
from toolkit.terminal import err, out

HELP_FLAGS = {"-h", "--help", "help"}
COMMANDS = {
    "train": "Compare ways to train: speed, memory and loss.",
    "compare": "Compare two results of bench train; exit status 1 where the second is slower or hungrier.",
    "arms": "List the arms that come with meldkit.",
}
TRAIN_USAGE = "meldkit bench train --arms hf,trl --out FOLDER [--OPTION VALUE ...]"
COMPARE_USAGE = "meldkit bench compare OLD NEW [--OPTION VALUE ...]"
WRONG_INPUT, REGRESSED = 2, 1


def bench(argv: list[str]) -> int:
    """Run the command that ``argv`` begins with."""
    known: dict[str, Callable[[list[str]], int]] = {"train": _train, "compare": _compare, "arms": _arms}
    if argv[0] not in known:
        err(f"error: unknown command '{argv[0]}'{did_you_mean(argv[0], known)}")
        err("  hint: meldkit bench --help lists what there is")
        return WRONG_INPUT
    return known[argv[0]](argv[1:])


def _train(argv: list[str]) -> int:
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(TRAIN_USAGE, BenchTrainConfig))
        return 0 if argv else WRONG_INPUT
    config = load_for_command(BenchTrainConfig, argv).config
    from toolkit.benchmarks.gates import OK
    from toolkit.benchmarks.tables import notes_of, plain_table, rows_of
    from toolkit.benchmarks.train import bench_train

    try:
        with _watching() as watch:
            result = bench_train(config, say=err, watch=watch)
    except KeyboardInterrupt:
        raise Interrupted(
            "the benchmark was interrupted; its finished trials are kept",
            hint="the same command with --resume",
        ) from None
    out("\n".join(["", *plain_table(rows_of(result)), "", *notes_of(result), "", f"Written to {config.out}"]))
    return 0 if all(status == OK for entry in result["arms"] for status in entry["statuses"]) else 1


@contextmanager
def _watching() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is measured now; drawing it costs the trial nothing that can be seen."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    last = [""]

    def show(text: str) -> None:
        if text != last[0]:
            last[0] = text
            sys.stderr.write(f"\r\x1b[K  {text}\r")
            sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _compare(argv: list[str]) -> int:
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(COMPARE_USAGE, BenchCompareConfig))
        return 0 if argv else WRONG_INPUT
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    words = [f"--runs={json.dumps([file])}" for file in files] + argv[len(files) :]
    config = load_for_command(BenchCompareConfig, words).config
    from toolkit.benchmarks.compare import compare, load_result
    from toolkit.benchmarks.tables import plain_table

    old, new = (load_result(path) for path in config.runs)
    changes = compare(old, new, config)
    rows = [("arm", "time a token", "99 % interval", "memory", "")]
    for change in changes:
        time = interval = memory = ""
        if change.slowdown is not None:
            time = f"{change.slowdown.value:+.1%}"
            interval = f"{change.slowdown.low:+.1%} to {change.slowdown.high:+.1%}"
        if change.memory is not None:
            memory = f"{change.memory:+.1%}"
        rows.append((change.arm, time, interval, memory, "; ".join(change.failures) or "passes"))
    out("\n".join(plain_table(rows)))
    return REGRESSED if any(change.failures for change in changes) else 0


def _arms(argv: list[str]) -> int:
    from toolkit.benchmarks.arms import load_arm, shipped_arms
    from toolkit.benchmarks.tables import plain_table

    out("\n".join(plain_table([(name, load_arm(name).about) for name in shipped_arms()])))
    return 0
