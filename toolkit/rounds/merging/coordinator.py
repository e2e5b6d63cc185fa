"""Merging the participants of a run: one call for each merge, checked and timed."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from toolkit.errors import InputError, MeldkitError
from toolkit.merging.states import State
from toolkit.rounds.merging import integrity, tied
from toolkit.rounds.merging.attempts import Deadline, attempt
from toolkit.rounds.merging.combination import Combination, Combined, Part, seed_of
from toolkit.rounds.merging.contribution import Contribution, MergeOutcome
from toolkit.rounds.merging.factors import factor_pairs, summary

# Methods whose elements are weighted means, with weights of 0 and more, of the states' elements.
MEANS = {"linear", "fisher", "fisher_simple", "from_optimizer"}


class MergeCoordinator:
    """Merges states of participants as the run's options say.

    Args:
        config: ``merge_algorithm``, ``merge_parameters``, ``lora_merge``, ``merge_timeout`` (seconds),
            ``max_merge_attempts``, ``validate_merge_integrity``.
        base: theta_0 of methods on deltas: the state that all participants started from. A LoRA adapter's has B = 0.
        adapter_config: PEFT's LoraConfig where states are adapters.
        seed: of random masks; every merge gets other ones, by its label.

    Raises:
        InputError: the options do not fit together.
    """

    def __init__(
        self,
        config: Any,
        *,
        base: Mapping[str, Tensor] | None = None,
        adapter_config: Any = None,
        seed: int = 0,
    ) -> None:
        self.combination = Combination(
            config.merge_algorithm,
            config.merge_parameters or {},
            lora_merge=None if adapter_config is None else config.lora_merge,
        )
        if self.combination.needs_base and base is None:
            raise InputError(f"{config.merge_algorithm} needs the state that the participants started from")
        self._base = base if self.combination.uses_base else None
        self._seed = seed
        self._timeout_seconds = float(config.merge_timeout)
        self._max_attempts = config.max_merge_attempts
        self._validate = config.validate_merge_integrity

    def merge(self, contributions: Sequence[Contribution], *, label: str) -> MergeOutcome:
        """Merge all contributions of a weight above 0 into one state.

        Args:
            contributions: of at least one participant, in a fixed order.
            label: of this merge in the run ("round 3, en-US"): for messages, and for random masks.

        Raises:
            InputError, ModelError: contributions that do not fit together.
            MergeError: NaN or infinity, an integrity check that failed, the time is over, or no attempt succeeded.
        """
        started = time.perf_counter()
        used, notes = self._used(contributions)
        what = f"merge {label}"
        (combined, facts), attempts = attempt(
            lambda deadline: self._merge(used, label, deadline),
            what=what,
            max_attempts=self._max_attempts,
            timeout_seconds=self._timeout_seconds,
        )
        checks = dict(facts)
        if combined.errors:
            checks["products"] = summary(combined.errors)
        return MergeOutcome(
            state=combined.state,
            weights={entry.participant: entry.weight for entry in contributions},
            method=self.combination.name,
            seconds=time.perf_counter() - started,
            attempts=attempts,
            input_sha256=checks.pop("input_sha256", {}),
            output_sha256=checks.pop("output_sha256", ""),
            integrity=checks,
            notes=notes,
        )

    # Inside

    def _used(self, contributions: Sequence[Contribution]) -> tuple[list[Contribution], list[str]]:
        names = [entry.participant for entry in contributions]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"a merge needs participants, each once, and was given: {', '.join(names) or 'none'}"
            )
        integrity.check_weights({entry.participant: entry.weight for entry in contributions})
        used = [entry for entry in contributions if entry.weight > 0]
        notes = []
        if left_out := [entry.participant for entry in contributions if not entry.weight]:
            notes.append(f"left out, with weight 0: {', '.join(left_out)}")
        if len(used) == 1:
            notes.append(f"{used[0].participant} is alone: its own state is the result")
            return used, notes
        method = self.combination.method
        self.combination.check_number(len(used))
        without = [entry.participant for entry in used if entry.fisher is None]
        if method.needs_fisher and without:
            raise InputError(f"{method.name} weighs by a Fisher, which {', '.join(without)} did not bring")
        if not self.combination.uses_weights:
            notes.append(f"{method.name} takes no weights: they only decide who takes part")
        return used, notes

    def _merge(
        self, used: Sequence[Contribution], label: str, deadline: Deadline
    ) -> tuple[Combined, dict[str, Any]]:
        facts: dict[str, Any] = {}
        states = {entry.participant: entry.state for entry in used}
        if self._validate:
            integrity.check_alike(states)
            facts["input_sha256"] = self._hashes(states, deadline)
        try:
            combined = self._combine(used, label, deadline)
        except MeldkitError as error:
            error.message = f"merge {label}: {_named(error.message, list(states))}"
            raise
        if self._validate:
            facts |= self._validated(used, combined.state, facts["input_sha256"], deadline)
        return combined, facts

    def _combine(self, used: Sequence[Contribution], label: str, deadline: Deadline) -> Combined:
        first = used[0].state
        if len(used) == 1:
            return Combined({name: tensor.detach().clone() for name, tensor in first.items()})
        fishers = [entry.fisher or {} for entry in used]
        repeated = (
            {} if self.combination.is_lora else tied.tied_names([entry.state for entry in used], fishers)
        )
        combined = self.combination.combine(
            Part(
                states=[tied.without(entry.state, repeated) for entry in used],
                weights=[entry.weight for entry in used],
                fisher=[tied.without(fisher, repeated) for fisher in fishers],
                base=None if self._base is None else tied.without(self._base, repeated),
                seed=seed_of(self._seed, label),
                on_progress=deadline.check,
            )
        )
        return Combined(tied.restored(combined.state, repeated, list(first)), combined.errors)

    def _hashes(self, states: Mapping[str, State], deadline: Deadline) -> dict[str, str]:
        hashes = {}
        for participant, state in states.items():
            hashes[participant] = integrity.sha256_of(state)
            deadline.check()
        return hashes

    def _validated(
        self, used: Sequence[Contribution], merged: State, before: Mapping[str, str], deadline: Deadline
    ) -> dict[str, Any]:
        """The checks of a result, and what they say."""
        states = {entry.participant: entry.state for entry in used}
        integrity.check_result(merged, used[0].state)
        facts: dict[str, Any] = {
            "weight_sum": integrity.check_sum({entry.participant: entry.weight for entry in used}),
            "names_shapes_dtypes": True,
            "finite": True,
        }
        facts["inside_envelope"] = self._check_envelope(list(states.values()), merged)
        integrity.check_unchanged(before, self._hashes(states, deadline))
        facts["inputs_unchanged"] = True
        facts["output_sha256"] = integrity.sha256_of(merged)
        return facts

    def _check_envelope(self, states: Sequence[State], merged: State) -> bool | None:
        """True after the check; None where the method's results may lie outside."""
        if len(states) > 1 and self.combination.method.name not in MEANS:
            return None
        products = {name for pair in factor_pairs(merged) for name in (pair.a, pair.b)}
        names = [
            name
            for name, tensor in merged.items()
            if tensor.is_floating_point() and not (self.combination.by_products and name in products)
        ]
        integrity.check_envelope(merged, states, names)
        return True


def _named(message: str, participants: Sequence[str]) -> str:
    """The engine's message with names in the place of numbers."""

    def name(match: re.Match[str]) -> str:
        number = int(match[2])
        return f"{match[1]} of {participants[number]}" if number < len(participants) else match[0]

    return re.sub(r"\b(state|Fisher) (\d+)\b", name, message)
