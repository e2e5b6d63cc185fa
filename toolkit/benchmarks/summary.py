"""From trials to what a benchmark says: a summary of each arm, and its ratios to the reference."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from toolkit.benchmarks.arms import Arm
from toolkit.benchmarks.gates import OK, status_beside
from toolkit.benchmarks.peaks import peak_tflops_of
from toolkit.benchmarks.ratio import Trial, paired_ratio, rate

COUNTS = {"tokens": "num_tokens", "trainable_tokens": "num_trainable_tokens", "samples": "num_rows"}
"""What a second is measured in, and the count of a step that it comes from."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def counted_steps(trial: Mapping[str, Any], count: str, warmup_steps: int) -> Trial:
    """(``count``, seconds) of the steps after the warm-up."""
    return [(step[COUNTS[count]], step["seconds"]) for step in trial["steps"][warmup_steps:]]


def judge(
    arms: Sequence[Arm], trials: Sequence[Mapping[str, Any]], *, loss_tolerance: float
) -> list[dict[str, Any]]:
    """The trials with the gates that need the reference, the first arm, applied."""
    of_reference = [trial for trial in trials if trial["arm"] == arms[0].name and trial["status"] == OK]
    by_name = {arm.name: arm for arm in arms}
    judged = []
    for trial in trials:
        values = dict(trial)
        if trial["status"] == OK and of_reference:
            values["status"], values["reason"] = status_beside(
                by_name[trial["arm"]], trial, of_reference[0], loss_tolerance=loss_tolerance
            )
        judged.append(values)
    return judged


def summarise(
    arms: Sequence[Arm],
    trials: Sequence[Mapping[str, Any]],
    *,
    warmup_steps: int,
    gpus: Sequence[Mapping[str, Any]],
    peak_tflops: float | None,
) -> list[dict[str, Any]]:
    """One entry for each arm: its definition, its statuses, medians over its trials, and ratios to the first arm.

    An arm of which a trial has another status than ``ok`` has no numbers at all.
    """
    good = {
        arm.name: {t["repeat"]: t for t in trials if t["arm"] == arm.name and t["status"] == OK}
        for arm in arms
    }
    entries = []
    for arm in arms:
        own = [trial for trial in trials if trial["arm"] == arm.name]
        is_whole = bool(own) and len(good[arm.name]) == len(own)
        entry: dict[str, Any] = {
            "arm": {k: v for k, v in arm.as_dict().items() if k != "python" or v != sys.executable},
            "statuses": [trial["status"] for trial in own],
            "reasons": sorted({trial["reason"] for trial in own if trial["reason"]}),
            "measured": None,
            "ratios": None,
        }
        if is_whole:
            entry["measured"] = _measured(own, warmup_steps, _peak(own[0], gpus, peak_tflops))
            entry["ratios"] = _ratios(good[arm.name], good[arms[0].name], warmup_steps)
        entries.append(entry)
    return entries


def _measured(
    trials: Sequence[Mapping[str, Any]], warmup_steps: int, peak: tuple[float, str] | None
) -> dict[str, Any]:
    facts = [trial["facts"] for trial in trials]
    seconds = [step["seconds"] for trial in trials for step in trial["steps"][warmup_steps:]]
    measured: dict[str, Any] = {}
    for count in COUNTS:
        rates = [rate(counted_steps(trial, count, warmup_steps)) for trial in trials]
        measured[f"{count}_per_second"] = median(rates)
        measured[f"{count}_per_second_of_trials"] = rates
    measured["padding_share"] = 1 - trials[0]["rows"]["num_tokens"] / trials[0]["rows"]["num_padded_tokens"]
    measured["num_steps_counted"] = len(seconds)
    measured["step_seconds_quantiles"] = dict(
        zip(map(str, QUANTILES), map(float, np.quantile(seconds, QUANTILES)), strict=True)
    )
    measured["first_step_seconds"] = median(trial["steps"][0]["seconds"] for trial in trials)
    for name in ("load_seconds", "whole_seconds", "initial_loss", "final_loss"):
        measured[name] = median(fact[name] for fact in facts)
    for name in ("peak_rss_bytes", "load_peak_rss_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
        values = [fact[name] for fact in facts]
        measured[name] = None if None in values else max(values)
    values = [fact["peak_process_gpu_bytes"] for fact in facts]
    measured["peak_process_gpu_bytes"] = None if None in values else max(values)
    flops = facts[0]["flops_per_token"] * measured["tokens_per_second"]
    measured["tflops"] = flops / 1e12
    measured["mfu"] = None if peak is None else flops / 1e12 / (peak[0] * facts[0]["world_size"])
    measured["peak_tflops"] = None if peak is None else {"value": peak[0], "source": peak[1]}
    shown = (
        "trainer",
        "model",
        "dtypes",
        "precision",
        "gradient_checkpointing",
        "optim",
        "device",
        "world_size",
    )
    measured["what"] = {name: facts[0][name] for name in (*shown, "num_trainable", "num_threads")}
    return measured


def _ratios(
    own: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], warmup_steps: int
) -> dict[str, Any] | None:
    """By count: ratio of the rates to the reference's, over the repeats that both have."""
    common = sorted(own.keys() & reference.keys())
    if not common:
        return None
    ratios = {}
    for count in COUNTS:
        pairs = [[counted_steps(of[r], count, warmup_steps) for r in common] for of in (own, reference)]
        ratio = paired_ratio(pairs[0], pairs[1])
        verdict = ratio.verdict if len(common) > 1 else "one trial"  # which tells nothing of the next one
        ratios[count] = asdict(ratio) | {"verdict": verdict, "num_pairs": len(common)}
    return ratios


def _peak(
    trial: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]], given: float | None
) -> tuple[float, str] | None:
    if given is not None:
        return given, "--peak-tflops"
    if trial["facts"]["device"] != "cuda" or not gpus:
        return None
    return peak_tflops_of(gpus[0]["name"])
