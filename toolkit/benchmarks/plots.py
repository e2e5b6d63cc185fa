"""Pictures of a benchmark, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.dependencies import is_installed

NAMES = ("speed", "memory")
FORMATS = ("png", "svg")


def draw(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Write speed and memory of the arms as PNG and SVG; the names of the PNG files. None without matplotlib, and
    where no arm was measured."""
    entries = [entry for entry in result["arms"] if entry["measured"] is not None]
    if not entries or not is_installed("matplotlib"):
        return []
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = []
    for name, axes_of in zip(NAMES, (_speed, _memory), strict=True):
        figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.55 * len(entries)), layout="constrained")
        axes_of(axes, entries, result)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        for suffix in FORMATS:
            figure.savefig(folder / f"{name}.{suffix}", dpi=144)
        pyplot.close(figure)
        drawn.append(f"{name}.png")
    return drawn


def _speed(axes: Any, entries: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Bars of the ratio to the reference with its interval, and a dot for each trial."""
    reference = result["arms"][0]
    base = reference["measured"]
    names = [entry["arm"]["name"] for entry in entries]
    if base is None:
        rates = [entry["measured"]["trainable_tokens_per_second"] for entry in entries]
        axes.barh(names, rates, color="#7a9cc6")
        axes.set_xlabel("trained tokens a second")
        return
    ratios = [entry["ratios"]["trainable_tokens"] for entry in entries]
    values = [ratio["value"] for ratio in ratios]
    errors = [
        [max(0.0, r["value"] - r["low"]) for r in ratios],
        [max(0.0, r["high"] - r["value"]) for r in ratios],
    ]
    axes.barh(names, values, xerr=errors, color="#7a9cc6", capsize=4, height=0.6)
    for y, entry in enumerate(entries):
        rates = entry["measured"]["trainable_tokens_per_second_of_trials"]
        dots = [rate / base["trainable_tokens_per_second"] for rate in rates]
        axes.plot(dots, [y] * len(dots), "o", color="#1f3d66", markersize=3)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"trained tokens a second, {reference['arm']['name']} = 1; 95 % interval, a dot a trial")


def _memory(axes: Any, entries: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    on_gpu = all(entry["measured"]["peak_reserved_bytes"] is not None for entry in entries)
    key = "peak_reserved_bytes" if on_gpu else "peak_rss_bytes"
    values = [entry["measured"][key] / 1e9 for entry in entries]
    bars = axes.barh([entry["arm"]["name"] for entry in entries], values, color="#c6a87a", height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(right=1.15 * max(values))
    axes.set_xlabel(f"{'reserved GPU' if on_gpu else 'resident'} memory at its peak, GB")
