"""What ``--merge-algorithm``, ``--merge-parameters`` and ``--lora-merge`` mean for the states of a merge, or a part."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from toolkit.config.names import did_you_mean
from toolkit.errors import InputError, MergeError
from toolkit.merging.memory import FisherMeasures, merge_state_dicts
from toolkit.merging.registry import REQUIRED, MergeMethod, merge_methods
from toolkit.merging.states import State
from toolkit.rounds.merging.factors import (
    Pair,
    ProductError,
    factor_pairs,
    mean_is_exact,
    mean_product,
    product_error,
)

# Names of algorithms of rounds that are methods of the engine with another name.
ALGORITHMS = {"fisher_dataset": "fisher"}
# Methods whose elements are weighted means, with weights of 0 and more, of the states' elements.
MEANS = frozenset({"linear", "fisher", "fisher_simple", "from_optimizer"})
# Methods that do to an element what they do wherever it lies: a tensor can be merged stretch by stretch.
ELEMENTWISE = frozenset({"linear", "task_arithmetic", "fisher", "from_optimizer"})
LORA_MODES = ("auto", "factors", "svd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One result that is wanted of the states.

    Attributes:
        label: of the merge in the run, for random masks and messages.
        weights: by participant; of all participants.
        receiver: where participants are spread over ranks, the one whose rank gets the result; None for all ranks.
    """

    label: str
    weights: Mapping[str, float]
    receiver: str | None = None

    def takes(self, participant: str) -> bool:
        return self.weights.get(participant, 0.0) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The states of a merge, or the same tensors (or the same stretches of them) of each.

    Attributes:
        states: of K participants, in the run's order of participants.
        weights: their shares, above 0.
        fisher: of each; empty where the method takes none.
        measures: of each whole Fisher.
        base: theta_0 of the same tensors, where the method takes one.
        seed: of random masks.
        on_progress: called after each tensor; what it raises ends the merge.
    """

    states: Sequence[State]
    weights: Sequence[float]
    fisher: Sequence[State]
    measures: Sequence[FisherMeasures]
    base: State | None
    seed: int
    on_progress: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Combined:
    """The merged tensors, and of adapters how far each module's product is from the mean of the products."""

    state: dict[str, Tensor]
    errors: dict[str, ProductError] = field(default_factory=dict)


class Combination:
    """One way of merging, for all merges of a run.

    Args:
        algorithm: a merge method of the engine, or ``fisher_dataset``.
        parameters: of the method, without weights.
        lora_merge: None of full states; else ``svd``, ``factors`` or ``auto``: svd for ``linear``, factors for others.

    Raises:
        InputError: no such method, one that cannot merge participants, or parameters that it does not take.
    """

    def __init__(self, algorithm: str, parameters: Mapping[str, Any], *, lora_merge: str | None) -> None:
        self.method = _method(algorithm)
        self._parameters = dict(parameters)
        self._check_parameters()
        self.is_lora = lora_merge is not None
        if self.is_lora and lora_merge not in LORA_MODES:
            raise InputError(f"lora_merge is {lora_merge!r}; there are {', '.join(LORA_MODES)}")
        self.by_products = self.method.name == "linear" and lora_merge in ("auto", "svd")
        if lora_merge == "svd" and not self.by_products:
            raise InputError(
                f"lora_merge svd is the mean of the products, which is what linear does, and not {algorithm}",
                hint="--lora-merge factors, or --merge-algorithm linear",
            )

    @property
    def name(self) -> str:
        """For records: the method, and of adapters what it is applied to."""
        if not self.is_lora:
            return self.method.name
        return f"{self.method.name} ({'products' if self.by_products else 'factors'})"

    @property
    def uses_base(self) -> bool:
        """Whether theta_0 changes the result."""
        return self.method.base != "none" and not self.method.base_is_a_model

    @property
    def needs_base(self) -> bool:
        return self.uses_base and self.method.base == "required"

    @property
    def uses_weights(self) -> bool:
        return self.method.base_is_a_model or any(p.name == "weight" for p in self.method.parameters)

    @property
    def is_elementwise(self) -> bool:
        """Whether stretches of a tensor can be merged one by one (of adapters only what is no factor)."""
        return self.method.name in ELEMENTWISE

    def convex_names(self, state: State) -> list[str]:
        """The tensors whose merged elements lie between the smallest and the largest of the states'."""
        if self.method.name not in MEANS:
            return []
        products = {name for pair in factor_pairs(state) for name in (pair.a, pair.b)}
        return [
            name
            for name, tensor in state.items()
            if tensor.is_floating_point() and not (self.by_products and name in products)
        ]

    def check_number(self, num_states: int) -> None:
        """Raises InputError where the method cannot merge so many states."""
        fewest, most = self.method.num_models
        if self.method.base_is_a_model:
            fewest, most = fewest + 1, None if most is None else most + 1
        if num_states < fewest or (most is not None and num_states > most):
            wanted = str(fewest) if fewest == most else f"at least {fewest}"
            raise InputError(f"{self.method.name} merges {wanted} participants, and there are {num_states}")

    def units(self, names: Sequence[str]) -> list[list[str]]:
        """The names in groups that must be merged by one call of :meth:`combine`."""
        if not self.is_lora:
            return [[name] for name in names]
        partners = {pair.a: [pair.a, pair.b] for pair in factor_pairs(names)}
        seconds = {unit[1] for unit in partners.values()}
        return [partners.get(name, [name]) for name in names if name not in seconds]

    def combine(self, part: Part) -> Combined:
        """Merge; one state alone is the result as it is.

        Raises:
            InputError, ModelError: states do not fit together.
            MergeError: NaN or infinity in an input or the result.
        """
        if len(part.states) == 1:
            return Combined({name: tensor.detach().clone() for name, tensor in part.states[0].items()})
        pairs = factor_pairs(part.states[0]) if self.is_lora else []
        rest = list(part.states[0])
        merged: dict[str, Tensor] = {}
        errors: dict[str, ProductError] = {}
        if self.by_products:
            for pair in pairs:
                if mean_is_exact(part.states, pair):
                    continue
                _refuse_non_finite(part.states, pair)
                factors, errors[pair.module] = mean_product(part.states, part.weights, pair)
                merged |= factors
                if part.on_progress is not None:
                    part.on_progress(sum(tensor.nbytes for tensor in factors.values()))
            rest = [name for name in rest if name not in merged]
        if rest:
            merged |= self._elementwise(part, rest)
        for pair in pairs:
            if pair.module not in errors:
                errors[pair.module] = product_error(merged, part.states, part.weights, pair)
        return Combined({name: merged[name] for name in part.states[0]}, errors)

    def _elementwise(self, part: Part, names: Sequence[str]) -> dict[str, Tensor]:
        states, base = [_only(state, names) for state in part.states], None
        parameters = dict(self._parameters)
        taken = {parameter.name for parameter in self.method.parameters}
        if self.method.base_is_a_model:
            base, states = states[0], states[1:]
            parameters.setdefault("t", part.weights[1] / sum(part.weights))
        elif "weight" in taken:
            parameters["weight"] = list(part.weights)
        if self.uses_base and part.base is not None:
            base = _only(part.base, names)
        fisher = None
        if self.method.needs_fisher:
            fisher = [{name: entry[name] for name in names if name in entry} for entry in part.fisher or ()]
        return merge_state_dicts(
            states,
            self.method.name,
            base=base,
            fisher=fisher,
            fisher_measures=None if fisher is None else part.measures,
            keep_order=True,
            seed=part.seed,
            on_progress=part.on_progress,
            **parameters,
        )

    def _check_parameters(self) -> None:
        method, problems = self.method, []
        if "weight" in self._parameters:
            problems.append("weights come from the weight calculation, not from merge_parameters")
        needed = {p.name for p in method.parameters if p.default is REQUIRED} - {"weight"}
        if method.base_is_a_model:
            needed -= {"t"}
        elif method.num_models[1] == 1:
            problems.append(f"{method.name} changes one model and does not merge several")
        problems += [
            f"{method.name} needs the parameter {name}" for name in sorted(needed - self._parameters.keys())
        ]
        known = {parameter.name: parameter for parameter in method.parameters}
        for name, value in self._parameters.items():
            if name not in known:
                problems.append(f"{method.name} has no parameter {name!r}{did_you_mean(name, known)}")
                continue
            try:
                known[name].check(value)
            except (TypeError, ValueError) as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise InputError("; ".join(problems))


def seed_of(seed: int, label: str) -> int:
    """A seed for one merge of the run: other random masks in each, the same ones after a resume."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _method(algorithm: str) -> MergeMethod:
    methods = merge_methods()
    name = ALGORITHMS.get(algorithm, algorithm)
    if name not in methods:
        known = [*methods, *ALGORITHMS]
        raise InputError(
            f"no merge algorithm {algorithm!r}{did_you_mean(algorithm, known)}",
            hint=f"there are {', '.join(known)}",
        )
    return methods[name]


def _only(state: State, names: Sequence[str]) -> dict[str, Tensor]:
    missing = [name for name in names if name not in state]
    if missing:
        raise InputError(f"a state lacks {missing[0]}, which the others have")
    return {name: state[name] for name in names}


def _refuse_non_finite(states: Sequence[State], pair: Pair) -> None:
    for k, state in enumerate(states):
        for name in (pair.a, pair.b):
            if not bool(state[name].isfinite().all()):
                raise MergeError(f"{name}: state {k} holds NaN or infinity")
