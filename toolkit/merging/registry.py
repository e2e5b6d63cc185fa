"""Merge methods by name: each is one function with its formula, its paper and its parameters."""

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from toolkit.config.names import did_you_mean
from toolkit.errors import ConfigError
from toolkit_kernels.rules import Rule

if TYPE_CHECKING:
    import torch


REQUIRED: Any = object()

MergeFunction = Callable[..., "Rule | torch.Tensor"]
WeightsCheck = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, under mergekit's name where mergekit has it.

    Attributes:
        name: as in a recipe file. The function's argument has the same name (``lambda_`` for ``lambda``).
        kind: float, int, bool, str, or Path for a file that the method reads: it counts among the merge's inputs.
        default: REQUIRED where there is none.
        per_model: every model (not the base) has its own; the function gets a float64 array [K], or a list.
        bounds: smallest and largest value; None for any.
        choices: the values of a text; none for any.
    """

    name: str
    kind: type
    default: Any
    per_model: bool = False
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()

    @property
    def argument(self) -> str:
        """The function's name for it."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    def check(self, value: Any) -> None:
        """Raises ValueError where a value of ``kind`` cannot be meant; the message completes ``density: ...``."""
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            low, high = self.bounds
            what = f"does not lie between {low:g} and {high:g}" if isfinite(high) else f"is less than {low:g}"
            raise ValueError(f"{value:g} {what}")
        if self.choices and value not in self.choices:
            advice = did_you_mean(value, self.choices)
            raise ValueError(f"'{value}' is not one of {', '.join(self.choices)}{advice}")


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A way to combine K tensors into one.

    Attributes:
        name: as in a recipe file.
        function: called once for each tensor as ``function(group, **parameters)``; returns a rule, which a kernel
            applies piece by piece, or the merged tensor itself where a whole tensor is needed at once.
        summary: first line of the function's docstring.
        paper: where the formula is from.
        base: whether a base model must, may or must not be given.
        base_is_a_model: the base is one of the K models (slerp's first one), not what deltas are taken from.
        num_models: fewest and most models beside the base; None for any number.
        parameters: what it understands.
        needs_fisher: each model brings a Fisher file.
        ordered: the order of the models has a meaning. Otherwise it must not change the result, and the function gets
            them in an order of their own (:mod:`toolkit.merging.order`).
        check: what is wrong with weights that are allowed one by one, whatever the tensor; None where nothing is. Asked
            with the arguments of ``function``, while a merge is planned.
    """

    name: str
    function: MergeFunction
    summary: str
    paper: str
    base: Literal["required", "optional", "none"]
    base_is_a_model: bool
    num_models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    needs_fisher: bool = False
    ordered: bool = False
    check: WeightsCheck | None = None

    def arguments(self, given: Mapping[str, Any], num_models: int) -> dict[str, Any]:
        """The keyword arguments of ``function`` from parameters as a user gives them.

        Args:
            given: by the names of ``parameters``; a per-model one is a number for all models or a list of K.
            num_models: K.

        Raises:
            ConfigError: names that the method does not know, lists of another length, a required one missing.
        """
        known = {parameter.name for parameter in self.parameters}
        problems = [
            f"{self.name} has no parameter '{name}'{did_you_mean(name, sorted(known))}"
            for name in given
            if name not in known
        ]
        arguments: dict[str, Any] = {}
        for parameter in self.parameters:
            value = given.get(parameter.name, parameter.default)
            if value is REQUIRED:
                problems.append(f"{self.name} needs the parameter '{parameter.name}'")
                continue
            if parameter.per_model:
                values = list(value) if np.ndim(value) else [value] * num_models
                if len(values) != num_models:
                    problems.append(f"{parameter.name}: {len(values)} values for {num_models} models")
                value = np.asarray(values, np.float64) if parameter.kind is float else values
            arguments[parameter.argument] = value
        if problems:
            raise ConfigError(problems)
        return arguments


METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    paper: str,
    parameters: Sequence[Parameter] = (),
    base: Literal["required", "optional", "none"] = "none",
    base_is_a_model: bool = False,
    num_models: tuple[int, int | None] = (1, None),
    needs_fisher: bool = False,
    ordered: bool = False,
    check: WeightsCheck | None = None,
) -> Callable[[MergeFunction], MergeFunction]:
    """Register the decorated function as the merge method ``name``; its docstring begins with one sentence."""

    def register(function: MergeFunction) -> MergeFunction:
        if name in METHODS:
            raise ValueError(f"the merge method {name!r} is registered twice")
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        METHODS[name] = MergeMethod(
            name,
            function,
            summary,
            paper,
            base,
            base_is_a_model,
            num_models,
            tuple(parameters),
            needs_fisher,
            ordered or base_is_a_model,
            check,
        )
        return function

    return register


def merge_methods() -> dict[str, MergeMethod]:
    """All methods by name."""
    import toolkit.merging.methods  # noqa: F401 - importing the package registers them

    return METHODS
