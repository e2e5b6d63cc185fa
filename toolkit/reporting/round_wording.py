"""Rounds, merges, alerts and the comparison as people read them, a line each."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len

from toolkit.reporting.records import AlertRecord, ComparisonRecord, MergeRecord, RoundRecord
from toolkit.reporting.round_metrics import main_metric
from toolkit.reporting.wording import duration, is_metric, number

MAX_NAMES = 8
MAX_WEIGHTS = 4
MAX_ROWS = 12


def names_in_short(names: Sequence[str], limit: int = MAX_NAMES) -> str:
    """``en-US, fr-FR and 50 more``."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[: limit - 1])} and {len(names) - limit + 1} more"


def weights_in_short(weights: Mapping[str, float], limit: int = MAX_WEIGHTS) -> str:
    """The largest weights: ``0.52 en-US, 0.31 fr-FR, 0.17 of 3 others``."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    shown = [f"{weight:.2f} {name}" for name, weight in ordered[:limit] if weight > 0]
    rest = [weight for _, weight in ordered[limit:] if weight > 0]
    if rest:
        shown.append(f"{sum(rest):.2f} of {len(rest)} other{'s' if len(rest) > 1 else ''}")
    return ", ".join(shown)


def merge_title(record: MergeRecord) -> str:
    """``merge after epoch 3: linear of en-US, fr-FR, 1.2 s``, or why there was none."""
    if record.status == "skipped":
        return f"no merge after epoch {record.epoch}: {record.error or record.reason}"
    sources = names_in_short(record.participants)
    if record.status == "failed":
        attempts = f"{record.attempts} attempt{'s' if record.attempts != 1 else ''}"
        what = f"merge after epoch {record.epoch} ({record.method} of {sources})"
        return f"{what} failed after {attempts}: {record.error}"
    seconds = f"{record.seconds:.1f} s" if record.seconds < 60 else duration(record.seconds)
    attempts = f", {record.attempts} attempts" if record.attempts > 1 else ""
    return f"merge after epoch {record.epoch}: {record.method} of {sources}, {seconds}{attempts} ({record.reason})"


def merge_rows(record: MergeRecord, *, all_metrics: bool) -> list[tuple[str, str, str, str]]:
    """What it did to each participant: name, metrics before and after, verdict and weights."""
    names = list(dict.fromkeys([*record.gate, *record.after, *record.before]))
    own = {} if is_shared(record) else record.weights
    return [
        (
            name,
            change_of_metrics(record, name, all_metrics=all_metrics),
            record.gate.get(name) or "",
            weights_in_short(own.get(name, {})),
        )
        for name in names
    ]


def is_shared(record: MergeRecord) -> bool:
    """Whether all receive the same state."""
    return len(record.weights) == 1 and len(record.gate) > 1


def change_of_metrics(record: MergeRecord, participant: str, *, all_metrics: bool) -> str:
    """``accuracy 0.9312 -> 0.9344, loss 0.2100 -> 0.2000``, or the first of them."""
    before, after = record.before.get(participant, {}), record.after.get(participant, {})
    names = [name for name in dict.fromkeys([*before, *after]) if is_metric(name)]
    if not all_metrics:
        names = [name for name in names if name.removeprefix("eval_") == main_metric(names)]
    texts = []
    for name in names:
        known = [number(metrics[name]) for metrics in (before, after) if name in metrics]
        texts.append(f"{name.removeprefix('eval_')} {' -> '.join(known)}")
    return ", ".join(texts)


def merge_lines(record: MergeRecord, *, is_complete: bool = False) -> list[str]:
    """The merge as lines of text; those after the first are details.

    Args:
        is_complete: all participants and metrics, else the first ones and the main one.
    """
    lines = [merge_title(record)]
    if record.status == "merged":
        if is_shared(record):
            targets, weights = next(iter(record.weights.items()))
            lines.append(
                f"toward {names_in_short(targets.split(','))}: {weights_in_short(weights, MAX_NAMES)}"
            )
        lines += aligned(merge_rows(record, all_metrics=is_complete), None if is_complete else MAX_ROWS)
    return [*lines, *(f"note: {note}" for note in record.notes)]


def round_lines(record: RoundRecord) -> list[str]:
    """``epoch 3/15 done, 2 active, 1:02; fr-FR stopped: ...``, and when the next merge is due."""
    parts = [f"epoch {record.epoch}/{record.num_epochs} done", f"{len(record.active)} active"]
    for count, word in ((len(record.stopped), "stopped early"), (len(record.failed), "failed")):
        if count:
            parts.append(f"{count} {word}")
    lines = [f"{', '.join(parts)}, {duration(record.seconds)}"]
    decision = record.decision
    if decision and not decision.get("should_merge") and decision.get("reason"):
        lines.append(f"no merge: {decision['reason']}")
    return lines


def departures(record: RoundRecord, known: set[str]) -> list[tuple[str, str]]:
    """Participants that left in this round: name and why. ``known`` are those that were reported before."""
    left = [(name, f"stopped early: {why}") for name, why in record.stopped.items() if name not in known]
    return left + [(name, f"failed: {why}") for name, why in record.failed.items() if name not in known]


def alert_line(record: AlertRecord) -> str:
    """``alert (loss explosion): fr-FR, step 120: ...``."""
    return f"alert ({record.kind.replace('_', ' ')}): {record.message}"


def comparison_lines(record: ComparisonRecord) -> list[str]:
    return [*aligned([record.columns, *record.rows]), *record.notes]


def aligned(rows: Sequence[Sequence[str]], max_rows: int | None = None) -> list[str]:
    """``rows`` as lines with their columns one below the other."""
    shown = rows if max_rows is None or len(rows) <= max_rows else rows[: max_rows - 1]
    num_columns = max((len(row) for row in shown), default=0)
    widths = [max(cell_len(row[i]) for row in shown if i < len(row)) for i in range(num_columns)]
    lines = [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False)
        ).rstrip()
        for row in shown
    ]
    if len(shown) < len(rows):
        lines.append(f"and {len(rows) - len(shown)} more: see merge_history.json")
    return lines
