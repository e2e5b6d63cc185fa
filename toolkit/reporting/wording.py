"""Numbers and records as people read them: the same on the terminal, in training.log and in the report."""

import math
from collections.abc import Mapping

from toolkit.reporting.records import EvaluationRecord, StepRecord


def number(value: float | str | None, digits: int = 4) -> str:
    """A loss or metric: 0.2451, 12.31, 1.2e-07, nan, inf; "-" for None."""
    if value is None:
        return "-"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 10.0**-digits or abs(value) >= 1e6):
        return f"{value:.2e}"
    places = max(0, digits - max(0, len(f"{abs(value):.0f}") - 1))
    return f"{value:.{places}f}"


def tick(value: float) -> str:
    """A round number on an axis: 0.5, 1200, 12k, 1.5M, 5e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor * (10 if unit == "k" else 1):
            return f"{value / factor:.6g}{unit}"
    return f"{value:.6g}"


def rate(value: float) -> str:
    """A learning rate: 1e-04 as 1.00e-04."""
    return f"{value:.2e}"


def size(num_bytes: float | None) -> str:
    """1.25 GB (powers of 1000, as the tools of GPU makers and disks print it); "-" for None."""
    if num_bytes is None or math.isnan(num_bytes):
        return "-"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """0:07, 12:34, 3:02:01, 2d 03:00; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def speed(tokens_per_second: float) -> str:
    """312 tok/s, 12.3k tok/s."""
    if tokens_per_second >= 10_000:
        return f"{tokens_per_second / 1000:.3g}k tok/s"
    return f"{tokens_per_second:.3g} tok/s" if tokens_per_second < 100 else f"{tokens_per_second:.0f} tok/s"


def epoch_label(epoch: float, num_epochs: float | None, *, phase_end: bool = False) -> str:
    """``epoch 2/3`` while the second pass is on, or with ``phase_end`` just after it."""
    done = epoch - 1e-6
    index = max(1, math.ceil(done) if phase_end else math.floor(done) + 1)
    if num_epochs is None:
        return f"epoch {index}"
    return f"epoch {min(index, math.ceil(num_epochs))}/{math.ceil(num_epochs)}"


def is_metric(name: str) -> bool:
    """Whether a value of an evaluation says how good the model is; a count (``num_tokens``) does not."""
    return not name.removeprefix("eval_").startswith("num_")


def evaluation_metrics(metrics: Mapping[str, float], train_loss: float | None) -> str:
    """``train_loss: 0.245, eval_loss: 0.198``."""
    named = {
        f"eval_{name.removeprefix('eval_')}": value for name, value in metrics.items() if is_metric(name)
    }
    if train_loss is not None:
        named = {"train_loss": train_loss, **named}
    return ", ".join(f"{name}: {number(value)}" for name, value in named.items())


def evaluation_label(record: EvaluationRecord, num_epochs: float | None) -> str:
    if record.phase != "during":
        return f"{record.phase} training"
    label = epoch_label(record.epoch, num_epochs, phase_end=True)
    whole = abs(record.epoch - round(record.epoch)) < 1e-6
    return label if whole else f"{label}, step {record.step}"


def step_line(record: StepRecord, *, seconds_left: float | None) -> str:
    """One step as a line of text, without the participant."""
    parts = [
        f"step {record.step}/{record.num_steps}",
        f"epoch {record.epoch:.2f}",
        f"loss {number(record.loss)}",
        f"lr {rate(record.learning_rate)}",
        speed(record.tokens_per_second),
        size(record.memory_bytes),
    ]
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)
