"""The tables of the study of iterative merging (``iterative_merging.py``), as Markdown."""

from collections.abc import Sequence
from typing import Any


def improvement(entry: dict[str, Any]) -> str:
    """Points of accuracy over own training with the interval; bold where the interval leaves zero out."""
    found = entry["improvement_over"].get("own_training")
    if found is None:
        return "-"
    text = f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return text if entry["verdict"] == "no difference" else f"**{text}** {entry['verdict']}"


def accuracy(entry: dict[str, Any], arm: str) -> str:
    value = entry["arms"].get(arm)
    return "-" if value is None else f"{100 * (value if isinstance(value, float) else value['value']):.1f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def as_markdown(found: dict[str, Any]) -> str:
    ways = found["ways"]
    if not ways:
        return "# Merging while training\n\nNothing is finished yet.\n"
    lines = [
        "# Merging while training: points of test accuracy over own training without a merge",
        "",
        f"`{found['command']}`, {found['seconds']['sum'] / 60:.0f} minutes of runs, two at a time. Mean over"
        " locales, 95 % interval of a paired bootstrap over rows and seeds; verdicts count locales.",
        "",
        *summary_table(ways, *found["num_rows"]),
        "",
        "## Without a merge, accuracy in percent",
        "",
        *no_merge_table(next(iter(ways.values()))),
        "",
        "## By locale",
        "",
        *locale_table(ways, found["locales"]),
        "",
    ]
    return "\n".join(lines)


def summary_table(ways: dict[str, Any], num_rich: int, num_low: int) -> list[str]:
    columns = ["merge", "seeds", "all", f"{num_rich} rows", f"{num_low} rows"]
    columns += ["helped / no difference / hurt", "rejected"]
    rows = []
    for name, way in ways.items():
        verdicts = " / ".join(str(way["num_verdicts"][v]) for v in ("helped", "no difference", "hurt"))
        offered = sum(way["gate"].values())
        means = [improvement(way[group]) for group in ("all", "rich", "low_resource")]
        rejected = f"{way['gate']['rejected']} of {offered}" if offered else "-"
        rows.append([name, str(len(way["seeds"])), *means, verdicts, rejected])
    return table(columns, rows)


def no_merge_table(way: dict[str, Any]) -> list[str]:
    arms = ("base", "own_training", "best_source")
    columns = ["locale", *(arm.replace("_", " ") for arm in arms)]
    return table(
        columns,
        [[locale, *(accuracy(entry, arm) for arm in arms)] for locale, entry in way["locales"].items()],
    )


def locale_table(ways: dict[str, Any], locales: Sequence[str]) -> list[str]:
    rows = [
        [name, *(improvement(way["locales"][locale]) for locale in locales)] for name, way in ways.items()
    ]
    return table(["merge", *locales], rows)
