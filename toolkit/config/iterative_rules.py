"""Rules between the options of iterative training and merging. What they need to know of merge methods, weightings and
schedules by name is in toolkit/rounds/option_rules.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.config.conflicts import Conflict, given, rule, value_of
from toolkit.config.names import did_you_mean

LOCALE_PLACEHOLDER = "{locale}"
FISHER_FROM_DATA = ("fisher_dataset", "fisher")
FISHER_ALGORITHMS = (*FISHER_FROM_DATA, "fisher_simple", "from_optimizer")
SIMILARITY_OPTIONS = ("similarity_features", "similarity_measure", "similarity_top_k", "similarity_sinkhorn")
# Adam's second moments, as they are: not factored, not quantized.
WITH_SECOND_MOMENTS = (
    "auto",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_apex_fused",
    "adamw_anyprecision",
    "adamw_hf",
)


def does_nothing_without(
    config: Any, names: Sequence[str], other: str, wanted: tuple[str, ...] = ()
) -> Iterator[Conflict]:
    """A conflict for each of ``names`` that is given while ``other`` is none of ``wanted``, or off."""
    value = value_of(config, other)
    if value in wanted or (value and not wanted):
        return
    condition = f"{other}: {' or '.join(wanted)}" if wanted else other
    for name in names:
        if given(config, name):
            yield Conflict((name,), (name, other), f"does nothing without {condition}")


def _is_iterative(config: Any) -> bool:
    return value_of(config, "merge_frequency") is not None


@rule
def _participants(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    locales = config.locales
    for name in config.max_rows_by_locale:
        if name not in locales:
            message = f"is none of the locales {', '.join(locales)}{did_you_mean(name, locales)}"
            yield Conflict(("max_rows_by_locale", name), ("max_rows_by_locale", "locales"), message)
    for name in ("participants_per_step", "num_processes", "similarity_top_k"):
        asked = value_of(config, name)
        if asked is not None and asked > len(locales):
            message = f"{asked} is more than there are locales ({len(locales)})"
            yield Conflict((name,), (name, "locales"), message)
    if config.target_languages and config.merge_scope == "each":
        names = ("target_languages", "merge_scope")
        yield Conflict(
            names[:1], names, "does nothing with merge_scope: each, where every locale is a target"
        )


@rule
def _training(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    if config.max_epochs != int(config.max_epochs):
        message = f"{config.max_epochs:g} is not a whole number; merges come after whole epochs"
        yield Conflict(("max_epochs",), ("max_epochs",), message)
    if config.eval_data is not None and (LOCALE_PLACEHOLDER in config.eval_data) != (
        LOCALE_PLACEHOLDER in config.data
    ):
        names = ("eval_data", "data")
        yield Conflict(
            names[:1], names, f"and data must both have {LOCALE_PLACEHOLDER}, or both hold all locales"
        )
    if config.fp16 and config.mixed_precision not in ("auto", "fp16"):
        names = ("fp16", "mixed_precision")
        yield Conflict(names[:1], names, f"excludes mixed_precision: {config.mixed_precision}")
    if config.metric in ("accuracy", "f1") and config.task == "causal-lm":
        names = ("metric", "task")
        message = f"'{config.metric}' is for classifiers; a language model has its loss"
        yield Conflict(names[:1], names, message)
    if config.eval_every == "never":
        message = "needs evaluations, and eval_every is never"
        deciding = (
            "merge_gate",
            "adaptive_merge_frequency",
            "performance_merge_trigger",
            "early_stopping_patience",
        )
        for name in deciding:
            if given(config, name):
                yield Conflict((name,), (name, "eval_every"), message)


@rule
def _weights(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    manual = config.manual_weights
    if config.weight_calculation == "manual":
        involved = ("manual_weights", "weight_calculation", "locales")
        missing = [locale for locale in config.locales if locale not in manual]
        if missing:
            example = ",".join(f"{locale}=1" for locale in config.locales[:3])
            message = f"lacks {', '.join(missing)}; every locale needs a weight, e.g. {example}"
            yield Conflict(("manual_weights",), involved, message)
        elif sum(manual.values()) == 0:
            yield Conflict(("manual_weights",), involved, "are all zero")
        for name in manual:
            if name not in config.locales:
                message = (
                    f"is none of the locales {', '.join(config.locales)}{did_you_mean(name, config.locales)}"
                )
                yield Conflict(("manual_weights", name), involved, message)
    else:
        yield from does_nothing_without(config, ["manual_weights"], "weight_calculation", ("manual",))
    if config.preweight is not None:
        yield from does_nothing_without(config, SIMILARITY_OPTIONS, "preweight", ("uriel",))
    else:
        yield from does_nothing_without(config, SIMILARITY_OPTIONS, "weight_calculation", ("similarity",))


@rule
def _fisher(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    from_data = ("fisher_data_mode", "num_fisher_examples", "fisher_batch_size")
    yield from does_nothing_without(config, from_data, "merge_algorithm", FISHER_FROM_DATA)
    yield from does_nothing_without(config, ("preweight",), "merge_algorithm", FISHER_ALGORITHMS)
    if config.preweight is not None and given(config, "weight_calculation"):
        message = "excludes weight_calculation; the weights come from one of the two"
        yield Conflict(("preweight",), ("preweight", "weight_calculation"), message)
    if config.merge_algorithm == "from_optimizer" and config.optim not in WITH_SECOND_MOMENTS:
        message = f"from_optimizer needs Adam's second moments, and optim is {config.optim}"
        yield Conflict(("merge_algorithm",), ("merge_algorithm", "optim"), message)


@rule
def _merging(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    if config.lora_merge == "svd" and config.merge_algorithm != "linear":
        message = f"svd is the mean of the products, which is what linear does and {config.merge_algorithm} does not"
        yield Conflict(("lora_merge",), ("lora_merge", "merge_algorithm"), message)
    yield from does_nothing_without(config, ["gate_tolerance"], "merge_gate")
    yield from does_nothing_without(config, ["bootstrap_samples"], "baselines")
    yield from does_nothing_without(config, ["early_stopping_threshold"], "early_stopping_patience")


@rule
def _schedule(config: Any) -> Iterator[Conflict]:
    if not _is_iterative(config):
        return
    if config.schedule is not None:
        if config.adaptive_merge_frequency:
            names = ("adaptive_merge_frequency", "schedule")
            yield Conflict(names[:1], names, "excludes schedule; it is another name of schedule: adaptive")
        return
    yield from does_nothing_without(
        config, ["min_merge_frequency", "max_merge_frequency"], "adaptive_merge_frequency"
    )
    if not config.adaptive_merge_frequency and not config.performance_merge_trigger:
        for name in ("convergence_threshold", "adaptive_window"):
            if given(config, name):
                needed = ("adaptive_merge_frequency", "performance_merge_trigger")
                yield Conflict((name,), (name, *needed), f"does nothing without {' or '.join(needed)}")
    if config.adaptive_merge_frequency:
        yield from _frequencies(config)


def _frequencies(config: Any) -> Iterator[Conflict]:
    fewest, most = config.min_merge_frequency, config.max_merge_frequency
    if fewest > most:
        names = ("min_merge_frequency", "max_merge_frequency")
        yield Conflict(names[:1], names, f"{fewest} is more than max_merge_frequency ({most})")
    elif not fewest <= config.merge_frequency <= most:
        names = ("merge_frequency", "min_merge_frequency", "max_merge_frequency")
        message = f"{config.merge_frequency} does not lie between min_ and max_merge_frequency ({fewest} and {most})"
        yield Conflict(names[:1], names, message)
