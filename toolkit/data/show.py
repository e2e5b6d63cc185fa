"""The check's report and rows with their trained tokens, for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from toolkit.data.check import CheckReport, Lengths, SplitReport, percent
from toolkit.data.encode import Encoded
from toolkit.data.special import SpecialTokens

BAR_WIDTH = 40
EIGHTHS = " ▏▎▍▌▋▊▉█"
NUM_LABELS_SHOWN = 10
TRAINED_STYLE = "bold green"
SPECIAL_STYLE = "cyan"


def show_report(report: CheckReport, console: Console) -> None:
    """Print a report: numbers of each split, histograms, labels, warnings, problems and the verdict."""
    parts = [part for part in (report.train, report.evaluation) if part]
    console.print(_facts(report))
    console.print(_numbers(report, parts))
    for part in parts:
        console.print(Text(f"\nLengths of the {part.name} rows in {part.lengths.unit}", style="bold"))
        console.print(histogram(part.lengths))
    if report.train.label_counts:
        console.print(Text("\nLabels", style="bold"))
        console.print(_labels(parts))
    console.print()
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    for note in report.notes:
        console.print(Text.assemble(("note: ", "dim"), note))
    for problem in report.problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem))
    if not report.problems:
        console.print(
            Text("no problems", style="green")
            if not report.warnings
            else Text("no problems, see the warnings")
        )


def _facts(report: CheckReport) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    rows = [("data", report.train.source), ("format", report.data_format), ("task", report.task)]
    if report.evaluation:
        rows.insert(1, ("held-out", report.evaluation.source))
    if report.tokenizer:
        rows.append(("tokenizer", report.tokenizer))
        rows.append(
            ("chat template", f"sha256 {report.template_sha256[:12]}" if report.template_sha256 else "none")
        )
    if report.turn_end:
        rows.append(("an answer ends with", report.turn_end))
    if report.fingerprint:
        rows.append(("fingerprint", f"sha256 {report.fingerprint[:12]}"))
    for name, value in rows:
        grid.add_row(Text(name, style="dim"), Text(value))
    return Group(grid, Text())


def _numbers(report: CheckReport, parts: Sequence[SplitReport]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for part in parts:
        table.add_column(part.name, justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        if any(value not in ("", "0", "-") for value in values) or name in (
            "rows",
            "repeated rows",
            "empty answers",
        ):
            table.add_row(name, *values)

    row("rows", [f"{p.num_rows:,}" for p in parts])
    if report.tokenizer:
        row("sequences", [f"{p.num_sequences:,}" for p in parts])
        row(
            "packed sequences",
            [f"{p.num_packed_sequences:,}" if p.num_packed_sequences else "-" for p in parts],
        )
        row("tokens", [f"{p.num_tokens:,}" for p in parts])
        if report.task == "causal-lm":
            row("trained tokens", [f"{p.num_trained_tokens:,} ({percent(p.trained_share)})" for p in parts])
    for name, key in (
        ("shortest", "min"),
        ("median", "p50"),
        ("95 % are at most", "p95"),
        ("longest", "max"),
    ):
        row(f"{name}, {parts[0].lengths.unit}", [f"{p.lengths.quantiles[key]:,}" for p in parts])
    if report.tokenizer:
        row("longer than --max-length", [_of_rows(p.overlong.get("num_rows_over", 0), p) for p in parts])
        row("  left out", [_of_rows(p.overlong.get("num_rows_dropped", 0), p) for p in parts])
        row("  cut", [_of_rows(p.overlong.get("num_rows_cut", 0), p) for p in parts])
        row("  split", [_of_rows(p.overlong.get("num_rows_split", 0), p) for p in parts])
        row("  answer tokens lost", [_answer_tokens_lost(p) for p in parts])
    row("repeated rows", [_of_rows(p.num_duplicate_rows, p) for p in parts])
    row("repeated answers", [f"{p.num_duplicate_answers:,}" for p in parts])
    if report.task == "causal-lm":
        row("empty answers", [f"{p.rendering.get('num_empty_answers', 0):,}" for p in parts])
        row("rows without answer", [f"{p.rendering.get('num_rows_without_answer', 0):,}" for p in parts])
    if report.evaluation:
        row("held-out rows in training", ["", _of_rows(report.num_leaked_rows, report.evaluation)])
    return table


def _of_rows(number: int, part: SplitReport) -> str:
    return f"{number:,} ({percent(number / max(1, part.num_rows))})" if number else "0"


def _answer_tokens_lost(part: SplitReport) -> str:
    lost, total = part.overlong.get("num_answer_tokens_lost", 0), part.overlong.get("num_answer_tokens", 0)
    return f"{lost:,} ({percent(lost / max(1, total))})" if lost else "0"


def histogram(lengths: Lengths) -> RenderableType:
    """Bars of block characters, one a bin."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column()
    grid.add_column(justify="right")
    most = max([*lengths.bin_counts, 1])
    for low, high, count in zip(lengths.bin_edges, lengths.bin_edges[1:], lengths.bin_counts, strict=False):
        label = f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}"
        grid.add_row(
            Text(label, style="dim"), Text(bar(count / most), style="blue"), f"{count:,}" if count else ""
        )
    return grid


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of ``share`` of the width, in eighths of a character; something that is there is never
    invisible."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return EIGHTHS[8] * full + (EIGHTHS[rest] if rest else "")


def _labels(parts: Sequence[SplitReport]) -> RenderableType:
    counts = parts[0].label_counts
    order = sorted(counts, key=lambda name: (-counts[name], name))
    shown = (
        order
        if len(order) <= NUM_LABELS_SHOWN
        else [*order[: NUM_LABELS_SHOWN // 2], *order[-NUM_LABELS_SHOWN // 2 :]]
    )
    grid = Table.grid(padding=(0, 1))
    most = counts[order[0]]
    for position, name in enumerate(shown):
        if len(order) > len(shown) and position == NUM_LABELS_SHOWN // 2:
            grid.add_row(Text(f"... {len(order) - len(shown)} more ...", style="dim"))
        numbers = " / ".join(f"{part.label_counts.get(name, 0):,}" for part in parts)
        grid.add_row(Text(name), Text(bar(counts[name] / most, 20), style="blue"), Text(numbers))
    return grid


def show_row(row: Encoded, tokenizer: Any, console: Console, *, title: str, max_length: int) -> None:
    """Print one row: trained tokens in colour or, without colours, in brackets; special tokens visible.

    Args:
        row: the row, before the overlong policy.
        tokenizer: the one that made it.
        console: where to.
        title: its place.
        max_length: marks where the row would be cut.
    """
    share = percent(row.num_trained / max(1, len(row)))
    note = f", {len(row) - max_length} over --max-length" if len(row) > max_length else ""
    console.print(
        Text(f"{title}: {len(row)} tokens, {row.num_trained} trained ({share}){note}", style="bold")
    )
    console.print(
        row_text(row, tokenizer, has_colour=console.color_system is not None, max_length=max_length)
    )
    console.print()


def row_text(row: Encoded, tokenizer: Any, *, has_colour: bool, max_length: int) -> Text:
    """The row as text, with ✂ at max_length; runs of equal kind are decoded together, so that characters of
    several tokens stay whole."""
    special = SpecialTokens(tokenizer).ids
    text = Text()
    kinds = [
        (bool(t), int(i) in special, n >= max_length)
        for n, (i, t) in enumerate(zip(row.ids, row.trained, strict=True))
    ]
    start = 0
    was_trained = False
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start]:
            continue
        trained, is_special, is_cut = kinds[start]
        if is_cut and start == max_length:
            text.append("✂", style="red")
        if not has_colour and trained != was_trained:
            text.append("⟦" if trained else "⟧")
        was_trained = trained
        style = TRAINED_STYLE if trained else SPECIAL_STYLE if is_special else ""
        text.append(
            tokenizer.decode(row.ids[start:end].tolist()), style=f"{style} strike" if is_cut else style
        )
        start = end
    if was_trained and not has_colour:
        text.append("⟧")
    return text


def show_formats(formats: Sequence[Any], console: Console) -> None:
    """Print each format with its fields and one row."""
    import json

    for entry in formats:
        fields = ", ".join([*entry.needs, *(f"{name} (optional)" for name in entry.takes)])
        console.print(f"[bold]{escape(entry.name)}[/bold]  {escape(entry.summary)}", highlight=False)
        console.print(Text(f"  fields: {fields}"))
        console.print(
            Text(f"  {json.dumps(dict(entry.sample), ensure_ascii=False)}", style="dim"), soft_wrap=True
        )
