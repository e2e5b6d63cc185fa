"""A benchmark in words: the table of its arms, for a terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.benchmarks.gates import OK, STATUSES

MB = 1_000_000
HEAD = (
    "arm",
    "trained tokens/s",
    "against {reference}",
    "verdict",
    "step",
    "first step",
    "memory",
    "loss after",
)


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: a head and a row for each arm. An arm whose trials may not count has its status in place of
    numbers."""
    reference = result["arms"][0]["arm"]["name"]
    rows = [tuple(cell.format(reference=reference) for cell in HEAD)]
    for entry in result["arms"]:
        name, measured = entry["arm"]["name"], entry["measured"]
        if measured is None:
            status = next(status for status in entry["statuses"] if status != OK)
            rows.append((name, status, "", "", "", "", "", ""))
            continue
        rows.append(
            (
                name,
                f"{measured['trainable_tokens_per_second']:,.0f}",
                *_against(entry, name == reference),
                f"{measured['step_seconds_quantiles']['0.5']:.2f} s",
                f"{measured['first_step_seconds']:.2f} s",
                _memory(measured),
                f"{measured['final_loss']:.4f}",
            )
        )
    return rows


def _against(entry: Mapping[str, Any], is_reference: bool) -> tuple[str, str]:
    if is_reference or entry["ratios"] is None:
        return ("1", "") if is_reference else ("", "reference failed")
    ratio = entry["ratios"]["trainable_tokens"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})", ratio["verdict"]


def _memory(measured: Mapping[str, Any]) -> str:
    if measured["peak_reserved_bytes"] is not None:
        return f"{measured['peak_reserved_bytes'] / MB:,.0f} MB"
    return f"{measured['peak_rss_bytes'] / MB:,.0f} MB RSS"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the table."""
    workload, machine = result["workload"], result["environment"]
    facts = workload["facts"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    low, _, middle, _, high = facts["row_tokens_quantiles"]
    notes = [
        f"{workload['settings']['model']} on {facts['num_rows']} rows of {low:.0f} to {high:.0f} tokens (5 to 95 %, "
        f"median {middle:.0f}), {workload['settings']['max_epochs']:g} passes; the first {result['warmup_steps']} "
        f"steps of a trial are not counted; {result['repeats']} trials an arm, each in a process of its own, in "
        "alternating order.",
        "Ratios are of trained tokens a second, with a 95 % interval (over pairs of trials); "
        "'no difference' where it spans 1. Step: median, first step apart. Loss: the same "
        f"{facts['loss_is_of']} for all arms, before {_initial(result)}.",
        f"{machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores, {gpus}; "
        + ", ".join(f"{name} {machine['versions'][name]}" for name in _NAMED if name in machine["versions"])
        + ".",
    ]
    if not machine["gpus"]:
        notes.append("Memory is the peak resident memory of the process while it trains; there is no GPU.")
    for entry in result["arms"]:
        bad = sorted({status for status in entry["statuses"] if status != OK})
        for status in bad:
            reason = f": {'; '.join(entry['reasons'])}" if entry["reasons"] else ""
            notes.append(f"{entry['arm']['name']}: {status} ({STATUSES[status]}){reason}")
    if any(trial["load_average_before"] > 1 for trial in result["trials"]):
        notes.append("Other work was on this machine: the load average was above 1 before some trials.")
    return notes


_NAMED = ("torch", "transformers", "trl", "peft", "unsloth", "meldkit")


def _initial(result: Mapping[str, Any]) -> str:
    losses = [entry["measured"]["initial_loss"] for entry in result["arms"] if entry["measured"]]
    if not losses:
        return "unknown"
    low, high = min(losses), max(losses)
    return f"{low:.4f}" if f"{low:.4f}" == f"{high:.4f}" else f"{low:.4f} to {high:.4f}"


def report(result: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The Markdown page of a benchmark."""
    arms = [
        f"- **{e['arm']['name']}**: {e['arm']['about'] or e['arm']['program']}. {_what(e)}"
        for e in result["arms"]
    ]
    git = result["environment"]["git"]
    revision = (
        "unknown" if git is None else git["revision"][:12] + (" with changes" if git["is_dirty"] else "")
    )
    lines = [
        "# Benchmark",
        "",
        *markdown_table(rows_of(result)),
        "",
        *[line for note in notes_of(result) for line in (note, "")],
        "## Arms",
        "",
        *arms,
        "",
        f"Revision {revision}. Measured with:",
        "",
        "```",
        result["command"],
        "```",
        "",
        *[f"![{name}]({name})" for name in plots],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _what(entry: Mapping[str, Any]) -> str:
    if entry["measured"] is None:
        return ""
    what = entry["measured"]["what"]
    checkpointing = "with" if what["gradient_checkpointing"] else "without"
    return (
        f"{what['trainer']} on {what['device']}, weights {' and '.join(what['dtypes'])}, mixed precision "
        f"{what['precision']}, {checkpointing} gradient checkpointing, {what['optim']}, "
        f"{what['num_trainable']:,} parameters trained, {entry['measured']['padding_share']:.0%} of the positions "
        "padding."
    )
