"""Rules between options and what is registered by name: merge methods, weightings, schedules.

Importing this module adds them to those of the configuration (:mod:`toolkit.config.conflicts`), which lies below and
knows no registries. An option at its default asks none.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.config.conflicts import Conflict, given, rule, value_of
from toolkit.config.iterative_rules import SIMILARITY_OPTIONS
from toolkit.config.names import did_you_mean
from toolkit.config.values import shown

if TYPE_CHECKING:
    from toolkit.merging.registry import MergeMethod, Parameter

ALGORITHMS_OF_ROUNDS = {"fisher_dataset": "fisher"}
"""Names of algorithms here that are methods of the merge engine with another name."""
WEIGHT_OPTIONS = ("weight_calculation", "manual_weights", "target_languages", *SIMILARITY_OPTIONS)
"""Options that only move weights."""
BUILT_IN_WEIGHTINGS = ("similarity", "performance", "average", "manual", "num_examples")


@rule
def _merge_algorithm(config: Any) -> Iterator[Conflict]:
    if not given(config, "merge_algorithm") and not given(config, "merge_parameters"):
        return
    # Imported here: numpy takes 0.1 s, and of the default everything is known.
    from toolkit.merging.registry import REQUIRED, merge_methods

    name: str = config.merge_algorithm
    methods = merge_methods()
    method = methods.get(ALGORITHMS_OF_ROUNDS.get(name, name))
    if method is None:
        known = sorted({*methods, *ALGORITHMS_OF_ROUNDS})
        message = f"'{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
        yield Conflict(("merge_algorithm",), ("merge_algorithm",), message)
        return
    files = [p.name for p in method.parameters if p.kind is Path and p.default is REQUIRED]
    if files:
        message = (
            f"{name} reads files ({', '.join(files)}) that belong to finished models; meldkit merge has it"
        )
        yield Conflict(("merge_algorithm",), ("merge_algorithm",), message)
        return
    yield from _number_of_locales(config, method)
    yield from _parameters(config, method)
    if all(parameter.name != "weight" for parameter in method.parameters):
        for option in WEIGHT_OPTIONS:
            if given(config, option):
                message = f"does nothing with merge_algorithm: {name}, which has no weights"
                yield Conflict((option,), (option, "merge_algorithm"), message)


def _number_of_locales(config: Any, method: "MergeMethod") -> Iterator[Conflict]:
    fewest, most = method.num_models
    if method.base_is_a_model:
        fewest, most = fewest + 1, None if most is None else most + 1
    count = len(config.locales)
    if fewest <= count <= (count if most is None else most):
        return
    wanted = str(fewest) if fewest == most else f"at least {fewest}" if count < fewest else f"at most {most}"
    message = f"{method.name} merges {wanted} models, and there are {count} locales"
    yield Conflict(("merge_algorithm",), ("merge_algorithm", "locales"), message)


def _parameters(config: Any, method: "MergeMethod") -> Iterator[Conflict]:
    from toolkit.merging.registry import REQUIRED

    asked: Mapping[str, Any] = config.merge_parameters
    known = {parameter.name: parameter for parameter in method.parameters}
    involved = ("merge_parameters", "merge_algorithm")
    for name, value in asked.items():
        if name == "weight":
            problem = "comes from weight_calculation"
        elif name not in known:
            others = sorted(known.keys() - {"weight"})
            what = f"{config.merge_algorithm} has no such parameter"
            problem = f"{what}{did_you_mean(name, others)}" + (f" ({', '.join(others)})" if others else "")
        else:
            problem = _problem(known[name], value)
        if problem:
            yield Conflict(("merge_parameters", name), involved, problem)
    for name, parameter in known.items():
        if parameter.default is REQUIRED and name not in asked and name != "weight":
            message = f"lacks {name}, which {config.merge_algorithm} needs: {name}={_example(parameter)}"
            yield Conflict(("merge_parameters",), involved, message)


def _problem(parameter: "Parameter", value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        float: is_number,
        int: is_number and isinstance(value, int),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }
    if not fits.get(parameter.kind, True):
        expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
        return f"{shown(value)} is not {expected[parameter.kind]}"
    try:
        parameter.check(value)
    except ValueError as error:
        return str(error)
    return None


def _example(parameter: "Parameter") -> str:
    return "0.5" if parameter.kind is float else parameter.kind.__name__.upper()


@rule
def _weighting(config: Any) -> Iterator[Conflict]:
    name = value_of(config, "weight_calculation")
    if name is None or name in BUILT_IN_WEIGHTINGS:
        return
    from toolkit.rounds.weighting import weightings

    known = sorted(weightings())
    if name not in known:
        message = f"'{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
        yield Conflict(("weight_calculation",), ("weight_calculation",), message)


@rule
def _schedule(config: Any) -> Iterator[Conflict]:
    name = value_of(config, "schedule")
    if name is None:
        return
    from toolkit.rounds.schedule import schedules

    known = sorted(schedules())
    if name not in known:
        message = f"'{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
        yield Conflict(("schedule",), ("schedule",), message)


def check_languages(config: Any) -> None:
    """Form the similarities that the run will need.

    Raises:
        InputError: a language is unknown, or too little is known of it.
    """
    from toolkit.languages import similarity_matrix

    similarity_matrix(list(dict.fromkeys([*config.locales, *config.targets])), config.similarity_features)
