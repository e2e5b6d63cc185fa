"""``meldkit bench compare``: two results of the same benchmark, before and after a change."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.benchmarks.gates import OK
from toolkit.benchmarks.ratio import HIGH_CONFIDENCE, Ratio, step_by_step, unpaired_ratio
from toolkit.benchmarks.summary import counted_steps
from toolkit.benchmarks.train import SCHEMA, result_file
from toolkit.config.bench_command import BenchCompareConfig
from toolkit.errors import InputError


@dataclass(frozen=True)
class Change:
    """What became of an arm.

    Attributes:
        slowdown: increase of the time a token, as a share, with its interval.
        memory: increase of the peak memory, as a share; None where neither side has it.
        failures: why it does not pass, in words; empty where it does.
    """

    arm: str
    slowdown: Ratio | None
    memory: float | None
    failures: tuple[str, ...]


def load_result(path: Path) -> dict[str, Any]:
    """A result of ``meldkit bench train``.

    Raises:
        InputError: there is none, or it is of another kind or version.
    """
    file = result_file(path)
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: {error.strerror}", hint="give folders of meldkit bench train --out"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    found = result.get("schema"), result.get("kind")
    if found != (SCHEMA, "train"):
        raise InputError(f"{file} has schema and kind {found}, and this version reads {(SCHEMA, 'train')}")
    return result


def share(text: str, option: str) -> float:
    """``5%`` or ``0.05`` as 0.05.

    Raises:
        InputError: neither.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise InputError(f"{option}: '{text}' is not a share like 5% or 0.05")
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why the two cannot be compared: other hardware, rows, model or settings."""
    found = []
    for name, value in _hardware(old).items():
        if _hardware(new)[name] != value:
            found.append(f"{name}: {value} and {_hardware(new)[name]}")
    before, after = old["workload"], new["workload"]
    paths = {"data", "output_dir"}
    for name in sorted(before["settings"].keys() | after["settings"].keys()):
        values = [side["settings"].get(name) for side in (before, after)]
        if name not in paths and values[0] != values[1]:
            found.append(f"{name}: {values[0]} and {values[1]}")
    for name in ("data_fingerprint", "model_fingerprint"):
        if before["facts"][name] != after["facts"][name]:
            found.append(f"{name.removesuffix('_fingerprint')}: not the same")
    if old["warmup_steps"] != new["warmup_steps"]:
        found.append(f"warmup_steps: {old['warmup_steps']} and {new['warmup_steps']}")
    return found


def _hardware(result: Mapping[str, Any]) -> dict[str, Any]:
    machine = result["environment"]
    return {
        "cpu": f"{machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores",
        "gpus": [gpu["name"] for gpu in machine["gpus"]],
        "memory_bytes": round(machine["memory_bytes"] / 1e9),
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any], config: BenchCompareConfig) -> list[Change]:
    """How each arm that was measured before changed.

    A slowdown counts where it is above the limit and its interval lies above zero: what is within the noise of the two
    benchmarks passes. The interval is of 99 %: one of 95 % would fail one in forty comparisons of equal code, and a
    gate that cries wolf is switched off.

    Raises:
        InputError: they cannot be compared, and ``--force`` was not given.
    """
    limits = share(config.max_slowdown, "--max-slowdown"), share(config.max_mem, "--max-mem")
    unlike = differences(old, new)
    if unlike and not config.force:
        raise InputError("these do not compare: " + "; ".join(unlike), hint="--force compares all the same")
    after = {entry["arm"]["name"]: entry for entry in new["arms"]}
    changes = []
    for entry in old["arms"]:
        name = entry["arm"]["name"]
        if entry["measured"] is None:
            continue
        if name not in after or after[name]["measured"] is None:
            bad = sorted({*after[name]["statuses"]} - {OK}) if name in after else ["no trial"]
            changes.append(Change(name, None, None, (f"measured before, and now: {', '.join(bad)}",)))
            continue
        changes.append(
            _change(name, old, new, entry["measured"], after[name]["measured"], config.metric, limits)
        )
    return changes


def _change(
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    metric: str,
    limits: tuple[float, float],
) -> Change:
    trials = [
        [
            counted_steps(trial, metric, side["warmup_steps"])
            for trial in side["trials"]
            if trial["arm"] == name and trial["status"] == OK
        ]
        for side in (new, old)
    ]
    faster = unpaired_ratio(*step_by_step(trials[0], trials[1]), confidence=HIGH_CONFIDENCE)
    slowdown = Ratio(1 / faster.value - 1, 1 / faster.high - 1, 1 / faster.low - 1)
    key = "peak_rss_bytes" if before["peak_reserved_bytes"] is None else "peak_reserved_bytes"
    memory = None if None in (before[key], after[key]) else after[key] / before[key] - 1
    failures = []
    if slowdown.value > limits[0] and slowdown.low > 0:
        failures.append(f"{slowdown.value:+.1%} time a token, more than {limits[0]:.1%}")
    if memory is not None and memory > limits[1]:
        failures.append(f"{memory:+.1%} memory, more than {limits[1]:.1%}")
    return Change(name, slowdown, memory, tuple(failures))
