"""Parameters of merge methods: what a recipe's settings mean for one tensor.

A setting is found at the most specific level that has one for the tensor: source of a slice, slice, module, recipe; its
first condition whose filter occurs in the tensor's name counts. A list is a gradient over the depth t from 0 (first
layer) to 1 (last layer): numbers are interpolated linearly, others are picked. t is 0 outside of the layers.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.values import shown
from toolkit.errors import ConfigError
from toolkit.merging.recipes.recipe import FISHER_SETTINGS, MergeRecipe, Scalar, Setting, Settings
from toolkit.merging.registry import REQUIRED, MergeMethod, Parameter, merge_methods

FISHER = Parameter("fisher", str, REQUIRED, per_model=True)
# What mergekit takes and what is not needed here.
NEEDLESS = {"int8_mask": "masks take no memory here"}
EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@functools.cache
def parameter_names() -> frozenset[str]:
    """The names of the parameters of all methods."""
    names = {parameter.name for method in merge_methods().values() for parameter in method.parameters}
    return frozenset(names | set(FISHER_SETTINGS) | set(NEEDLESS))


def parameters_of(method: MergeMethod) -> dict[str, Parameter]:
    """By every name under which a recipe may set them."""
    known = {parameter.name: parameter for parameter in method.parameters}
    return known | (dict.fromkeys(FISHER_SETTINGS, FISHER) if method.needs_fisher else {})


# --- one value


def converted(value: Scalar, kind: type) -> Any:
    """A scalar of a recipe as ``kind``. Raises ValueError, whose message completes ``density: ...``."""
    if kind is str:
        return str(value)
    if kind is Path:
        return Path(str(value)).expanduser()
    if kind is bool:
        word = WORDS.get(str(value).lower())
        if word is not None:
            return word
    elif not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return kind(number)
    raise ValueError(f"{shown(value)} is not {EXPECTED[kind]}")


def evaluate(setting: Setting, tensor_name: str, t: float, kind: type) -> Any:
    """The value for one tensor, or None where no condition fits its name."""
    for condition in setting.conditions:
        if condition.filter is None or condition.filter in tensor_name:
            if not isinstance(condition.value, tuple):
                return converted(condition.value, kind)
            return gradient([converted(value, kind) for value in condition.value], t)
    return None


def gradient(values: Sequence[Any], t: float) -> Any:
    """The value at depth t in [0, 1] of the piecewise linear function through ``values`` at equal distances.

    Booleans, texts and paths are not interpolated: element floor(t (n - 1)) counts.
    """
    at = t * (len(values) - 1)
    first = int(at)
    if isinstance(values[first], bool | str | Path):
        return values[first]
    second = min(first + 1, len(values) - 1)
    value = values[first] + (at - first) * (values[second] - values[first])
    return round(value) if isinstance(values[first], int) else value


# --- levels


@dataclass(frozen=True, eq=False)
class Levels:
    """Where settings are looked for, the most specific level first.

    Attributes:
        shared: for parameters of the whole tensor.
        models: for parameters of each of the K models.
    """

    shared: tuple[Settings, ...]
    models: tuple[tuple[Settings, ...], ...]


class Resolver:
    """Resolves the parameters of one method, each combination of depth and filters once.

    Args:
        recipe: all of its settings.
    """

    def __init__(self, method: MergeMethod, recipe: MergeRecipe) -> None:
        self.method = method
        conditions = [
            c for settings in recipe.settings() for setting in settings.values() for c in setting.conditions
        ]
        self.filters = sorted({c.filter for c in conditions if c.filter is not None})
        self.has_gradients = any(isinstance(c.value, tuple) for c in conditions)
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._fishers: dict[tuple[Any, ...], tuple[str, ...]] = {}

    def arguments(self, levels: Levels, name: str, model_names: Sequence[str], t: float) -> dict[str, Any]:
        """The keyword arguments of the method's function for one tensor; equal ones are the same object.

        Args:
            levels: where to look.
            name: of the tensor in the result: filters of shared parameters look at it.
            model_names: of the tensor in each of the K models.
            t: depth.

        Raises:
            LookupError: a required parameter has no value for this tensor; the message says which.
            ConfigError: the weights cannot be used together, e.g. they add up to zero.
        """
        key = self._key(levels, name, model_names, t)
        if key not in self._known:
            given: dict[str, Any] = {}
            for parameter in self.method.parameters:
                if parameter.per_model:
                    given[parameter.name] = self._each(parameter, levels, model_names, t)
                else:
                    given[parameter.name] = _value(parameter, levels.shared, name, t)
            arguments = self.method.arguments(given, len(model_names))
            if self.method.check is not None and (problem := self.method.check(arguments)):
                raise ConfigError([f"{_place_of_weights(levels) or self.method.name}: {problem}"])
            self._known[key] = arguments
        return self._known[key]

    def fishers(self, levels: Levels, name: str, model_names: Sequence[str], t: float) -> tuple[str, ...]:
        """The path of each model's Fisher file. Raises LookupError."""
        key = self._key(levels, name, model_names, t)
        if key not in self._fishers:
            self._fishers[key] = tuple(
                next((v for n in FISHER_SETTINGS if (v := _find(n, str, scopes, own, t)) is not None), None)
                or _missing(FISHER, own)
                for scopes, own in zip(levels.models, model_names, strict=True)
            )
        return self._fishers[key]

    def _each(self, parameter: Parameter, levels: Levels, model_names: Sequence[str], t: float) -> list[Any]:
        return [
            _value(parameter, scopes, own, t) for scopes, own in zip(levels.models, model_names, strict=True)
        ]

    def _key(self, levels: Levels, name: str, model_names: Sequence[str], t: float) -> tuple[Any, ...]:
        t = t if self.has_gradients else 0.0
        if not self.filters:
            return id(levels), t
        names = dict.fromkeys((name, *model_names))
        matches = tuple(tuple(part in own for part in self.filters) for own in names)
        # Which model has which of these names.
        order = tuple(list(names).index(own) for own in model_names) if len(matches) > 1 else ()
        return id(levels), t, matches, order


def _value(parameter: Parameter, scopes: Sequence[Settings], name: str, t: float) -> Any:
    value = _find(parameter.name, parameter.kind, scopes, name, t)
    if value is not None:
        return value
    return _missing(parameter, name) if parameter.default is REQUIRED else parameter.default


def _find(parameter_name: str, kind: type, scopes: Sequence[Settings], name: str, t: float) -> Any:
    for settings in scopes:
        if parameter_name in settings:
            value = evaluate(settings[parameter_name], name, t, kind)
            if value is not None:
                return value
    return None


def _place_of_weights(levels: Levels) -> str | None:
    scopes = [settings for scopes in levels.models for settings in scopes if "weight" in settings]
    return scopes[0]["weight"].place if scopes else None


def _missing(parameter: Parameter, name: str) -> Any:
    raise LookupError(
        f"no value of '{parameter.name}' fits the tensor {name}; end its list with one without filter"
    )
