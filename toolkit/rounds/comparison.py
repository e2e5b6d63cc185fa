"""The honest comparison: did merging while training help, locale by locale?

Every arm is one model of the same locale, on the same held-out rows:

    base            before any training
    own_training    the locale alone: same rows, steps and seed, and no merge
    last_merge      the last merged model that was offered to it
    best_source     the best of the other locales' own_training models, without any training on this language
    iterative       after iterative training and merging

The verdict is on iterative against own_training: ``helped`` where the 95 % interval of the improvement lies above zero,
``hurt`` where it lies below, else ``no difference``. An improvement is positive where iterative is better, whatever the
metric. Its interval is a paired bootstrap: the rows are drawn with replacement, the same ones for all arms; with
several seeds, these are drawn too, so that the interval also covers what another seed would change. An arm whose metric
is not finite has broken and is left out.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from toolkit.errors import RunError
from toolkit.evaluation.bootstrap import (
    CONFIDENCE,
    Interval,
    Metric,
    interval,
    metric_value,
    resampled_metric,
    resampled_seeds,
)
from toolkit.evaluation.outcomes import RowOutcomes
from toolkit.reporting.records import ComparisonRecord, Verdict

ARMS = ("base", "own_training", "last_merge", "best_source", "iterative")
JUDGED, REFERENCE = "iterative", "own_training"
HIGHER_IS_BETTER: dict[Metric, bool] = {"accuracy": True, "f1": True, "loss": False}
LEAST_ROWS = 20
"""Held-out rows below which nothing is called a difference: a bootstrap of so few is too sure of itself."""

Outcomes = Mapping[str, Mapping[str, Sequence[RowOutcomes]]]
"""outcomes[locale][arm]: one for each seed, in the order of the seeds."""


def metric_of(asked: str, task: str) -> Any:
    """The metric that models are compared by; ``auto``: accuracy of a classifier, loss of a language model."""
    if asked != "auto":
        return asked
    return "accuracy" if task == "sequence-classification" else "loss"


def best_source(candidates: Mapping[str, RowOutcomes], metric: Metric) -> str | None:
    """The model that is best on the rows of a locale, the first one of equals; None without candidates.

    Args:
        candidates: outcomes of other locales' models on these rows, by locale.
        metric: that decides.
    """
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    return max(candidates, key=lambda name: sign * metric_value(candidates[name], metric), default=None)


def compare(
    outcomes: Outcomes,
    *,
    metric: Metric,
    num_samples: int,
    seed: int,
    best_sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compare the arms of every locale.

    Args:
        outcomes: of every locale and arm, as :data:`Outcomes`; an arm may be missing, where nothing was measured.
        metric: ``accuracy``, ``f1`` or ``loss``.
        num_samples: samples of the bootstrap.
        seed: of the bootstrap. Each locale draws its own rows: another locale more changes nothing for it.
        best_sources: which locale the arm ``best_source`` is, by locale.

    Returns:
        JSON values, as they stand in final_statistics.json.

    Raises:
        RunError: a locale without rows, or arms with different rows or numbers of seeds.
    """
    num_seeds = _num_seeds(outcomes)
    seed_weights = resampled_seeds(num_seeds, num_samples, seed)
    participants: dict[str, Any] = {}
    improvements: dict[str, dict[str, np.ndarray]] = {}
    for locale, measured in outcomes.items():
        models = _paired(locale, measured)
        values = {arm: [metric_value(o, metric) for o in of_arm] for arm, of_arm in measured.items()}
        arms = {arm: measured[arm] for arm in values if np.isfinite(values[arm]).all()}
        samples: dict[str, np.ndarray] = {}
        if arms:
            draws = resampled_metric(
                [outcomes for of_arm in arms.values() for outcomes in of_arm],
                metric,
                num_samples=num_samples,
                seed=[seed, zlib.crc32(locale.encode())],
            ).reshape(len(arms), num_seeds, num_samples)
            samples = dict(zip(arms, (draws * seed_weights).sum(axis=1), strict=True))
        improvements[locale] = _improvement_samples(samples, metric)
        participants[locale] = _participant(len(models[0]), values, samples, improvements[locale], metric)
        if best_sources and locale in best_sources:
            participants[locale]["best_source"] = best_sources[locale]
    verdicts = [p["verdict"] for p in participants.values()]
    return {
        "metric": metric,
        "higher_is_better": HIGHER_IS_BETTER[metric],
        "judged": JUDGED,
        "reference": REFERENCE,
        "confidence": CONFIDENCE,
        "num_bootstrap_samples": num_samples,
        "bootstrap_seed": seed,
        "num_seeds": num_seeds,
        "participants": participants,
        "overall": _overall(participants, improvements),
        "num_verdicts": {verdict: verdicts.count(verdict) for verdict in ("helped", "hurt", "no difference")},
    }


def _num_seeds(outcomes: Outcomes) -> int:
    numbers = {len(of_arm) for arms in outcomes.values() for of_arm in arms.values()}
    if len(numbers) > 1 or 0 in numbers:
        raise RunError(
            f"comparison: arms with {sorted(numbers)} seeds; every arm needs the same number, at least one"
        )
    return numbers.pop() if numbers else 1


def _paired(locale: str, arms: Mapping[str, Sequence[RowOutcomes]]) -> list[RowOutcomes]:
    """All outcomes of a locale, arm after arm; they must be on the same rows."""
    models = [outcomes for of_arm in arms.values() for outcomes in of_arm]
    if not models or len(models[0]) == 0:
        raise RunError(f"comparison: nothing was measured for {locale}")
    for outcomes in models:
        pairs = [(outcomes.weight, models[0].weight), (outcomes.expected, models[0].expected)]
        if any((a is None) != (b is None) or not np.array_equal(a, b) for a, b in pairs):
            raise RunError(f"comparison: the arms of {locale} were not measured on the same rows")
    return models


def _participant(
    num_rows: int,
    values: Mapping[str, list[float]],
    samples: Mapping[str, np.ndarray],
    improvements: Mapping[str, np.ndarray],
    metric: Metric,
) -> dict[str, Any]:
    """One locale's part: ``values`` of all arms by seed, ``samples`` of those that are finite."""
    means = {arm: float(np.mean(values[arm])) for arm in samples}
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    improvement = {
        arm: interval(sign * (means[JUDGED] - means[arm]), drawn) for arm, drawn in improvements.items()
    }
    return {
        "num_rows": num_rows,
        "arms": {
            arm: asdict(interval(means[arm], samples[arm])) | {"by_seed": values[arm]}
            for arm in _ordered(samples)
        },
        "not_finite": [arm for arm in values if arm not in samples],
        "improvement_over": {arm: asdict(found) for arm, found in improvement.items()},
        "verdict": _verdict(improvement.get(REFERENCE), num_rows),
    }


def _improvement_samples(samples: Mapping[str, np.ndarray], metric: Metric) -> dict[str, np.ndarray]:
    """By how much the judged arm is better than each other one, in every sample."""
    if JUDGED not in samples:
        return {}
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    return {arm: sign * (samples[JUDGED] - samples[arm]) for arm in _ordered(samples) if arm != JUDGED}


def _verdict(improvement: Interval | None, num_rows: int) -> Verdict | None:
    """None where one of the two arms was not measured."""
    if improvement is None:
        return None
    if num_rows >= LEAST_ROWS and improvement.low > 0:
        return "helped"
    if num_rows >= LEAST_ROWS and improvement.high < 0:
        return "hurt"
    return "no difference"


def _overall(
    participants: Mapping[str, Any], improvements: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """The mean over the locales that were judged, each counting the same."""
    judged = [locale for locale, p in participants.items() if p["verdict"] is not None]
    if not judged:
        return {"participants": [], "arms": {}, "improvement_over": {}, "verdict": None}
    common = [arm for arm in ARMS if all(arm in participants[locale]["arms"] for locale in judged)]
    improvement = {
        arm: interval(
            float(np.mean([participants[locale]["improvement_over"][arm]["value"] for locale in judged])),
            np.mean([improvements[locale][arm] for locale in judged], axis=0),
        )
        for arm in common
        if arm != JUDGED
    }
    num_rows = sum(participants[locale]["num_rows"] for locale in judged)
    return {
        "participants": judged,
        "arms": {
            arm: float(np.mean([participants[locale]["arms"][arm]["value"] for locale in judged]))
            for arm in common
        },
        "improvement_over": {arm: asdict(found) for arm, found in improvement.items()},
        "verdict": _verdict(improvement.get(REFERENCE), num_rows),
    }


def _ordered(arms: Mapping[str, Any]) -> list[str]:
    return [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]


# The table

COLUMNS = [
    "locale",
    "base",
    "own training",
    "last merge",
    "best source",
    "iterative",
    "improvement",
    "verdict",
]
MISSING = "-"


def table_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The comparison as cells under :data:`COLUMNS`: locales with a verdict, the others, the mean over the former."""
    participants = comparison["participants"]
    judged = [locale for locale in participants if participants[locale]["verdict"] is not None]
    others = [locale for locale in participants if participants[locale]["verdict"] is None]
    rows = [_row(locale, participants[locale]) for locale in judged + others]
    if len(judged) > 1:
        overall = comparison["overall"]
        arms = {arm: {"value": value} for arm, value in overall["arms"].items()}
        rows.append(_row("mean", {**overall, "arms": arms}))
    return rows


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    cells = [name]
    for arm in ARMS:
        cell = f"{entry['arms'][arm]['value']:.4f}" if arm in entry["arms"] else MISSING
        if arm == "best_source" and "best_source" in entry:
            cell = f"{cell} {entry['best_source']}"
        cells.append(cell)
    improvement = entry["improvement_over"].get(REFERENCE)
    if improvement is None:
        return [*cells, MISSING, MISSING]
    span = f"[{improvement['low']:+.4f}, {improvement['high']:+.4f}]"
    return [*cells, f"{improvement['value']:+.4f} {span}", entry["verdict"]]


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know to read it right."""
    metric = comparison["metric"]
    better = "higher" if comparison["higher_is_better"] else "lower"
    seeds = comparison["num_seeds"]
    drawn = "rows" if seeds == 1 else f"rows and of {seeds} seeds"
    lines = [
        f"{metric} on held-out rows, {better} is better; improvement of iterative over own training with its"
        f" {comparison['confidence']:.0%} interval (paired bootstrap of {drawn},"
        f" {comparison['num_bootstrap_samples']} samples)"
    ]
    if seeds == 1:
        lines.append("one seed: what another seed would change is not in the interval")
    participants = comparison["participants"]
    num_judged = sum(comparison["num_verdicts"].values())
    if num_judged > 1:
        chance = (1 - comparison["confidence"]) * num_judged
        lines.append(
            f"of {num_judged} locales without any difference, about {chance:.1f} would not be called so"
        )
    few = [
        locale
        for locale, p in participants.items()
        if p["verdict"] is not None and p["num_rows"] < LEAST_ROWS
    ]
    if few:
        lines.append(f"fewer than {LEAST_ROWS} held-out rows, so never called a difference: {', '.join(few)}")
    broken = [f"{locale} {arm}" for locale, p in participants.items() for arm in p["not_finite"]]
    if broken:
        lines.append(f"left out, the {metric} is not finite: {', '.join(broken)}")
    if any("best_source" in p for p in participants.values()):
        lines.append("the best source was chosen on these rows: its figure is a little too good")
    return lines


def comparison_record(comparison: Mapping[str, Any]) -> ComparisonRecord:
    """The comparison for terminal, log and history."""
    participants = comparison["participants"]
    return ComparisonRecord(
        columns=list(COLUMNS),
        rows=table_rows(comparison),
        verdicts={locale: p["verdict"] for locale, p in participants.items() if p["verdict"] is not None},
        comparison=comparison,
        notes=notes(comparison),
    )
