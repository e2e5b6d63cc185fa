"""Merging the participants of a run: one call for each merge, checked and timed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from toolkit.errors import InputError, MeldkitError, MergeError
from toolkit.merging.states import State
from toolkit.rounds.merging import integrity
from toolkit.rounds.merging.attempts import Deadline, attempt
from toolkit.rounds.merging.combination import Combination, Combined, Job
from toolkit.rounds.merging.contribution import Contribution, MergeOutcome
from toolkit.rounds.merging.exchange import NUM_BYTES, Exchange
from toolkit.rounds.merging.factors import summary
from toolkit.rounds.merging.here import Here
from toolkit.rounds.merging.wire import Wire

ValueT = TypeVar("ValueT")

DORA = "DoRA: directions and magnitudes are merged apart, which is not the mean of the weights"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What every participant's state is known by, on all ranks; nothing without validation."""

    sha256: dict[str, str]
    checksums: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Merged:
    """What one attempt comes to: this rank's results by label, and the hashes of the results of all ranks."""

    jobs: dict[str, Job]
    inputs: _Inputs
    results: dict[str, Combined]
    output_sha256: dict[str, str]


class MergeCoordinator:
    """Merges states of participants as the run's options say.

    Args:
        config: ``merge_algorithm``, ``merge_parameters``, ``lora_merge``, ``merge_timeout`` (seconds),
            ``max_merge_attempts``, ``validate_merge_integrity``.
        base: theta_0 of methods on deltas: the state that all participants started from. A LoRA adapter's has B = 0.
        adapter_config: PEFT's LoraConfig where states are adapters.
        seed: of random masks; every merge gets other ones, by its label.
        participants: all of the run, in their fixed order; needed where they are spread over ranks.
        is_spread: they are, over the ranks of torch.distributed's default group: every rank calls the methods with
            its own participants.
        exchange_bytes: that parts of all participants' states may take together on a rank while they are merged.

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
        participants: Sequence[str] = (),
        is_spread: bool = False,
        exchange_bytes: int = NUM_BYTES,
    ) -> None:
        self.combination = Combination(
            config.merge_algorithm,
            config.merge_parameters or {},
            lora_merge=None if adapter_config is None else config.lora_merge,
        )
        if self.combination.needs_base and base is None:
            raise InputError(f"{config.merge_algorithm} needs the state that the participants started from")
        if is_spread and not participants:
            raise InputError("participants that are spread over ranks need an order")
        self._base = base if self.combination.uses_base else None
        self._seed, self._participants, self._is_spread = seed, tuple(participants), is_spread
        self._exchange_bytes = exchange_bytes
        self._notes_on_kind = [DORA] if getattr(adapter_config, "use_dora", False) else []
        self._timeout_seconds = float(config.merge_timeout)
        self._max_attempts = config.max_merge_attempts
        self._validate = config.validate_merge_integrity

    def merge(self, contributions: Sequence[Contribution], *, label: str) -> MergeOutcome:
        """Merge all contributions of a weight above 0 into one state.

        Args:
            contributions: in the run's order of participants; spread, those of this rank, maybe none.
            label: of this merge in the run ("round 3"): for messages, and for random masks. Never the same twice.

        Returns:
            The same outcome on all ranks.

        Raises:
            InputError, ModelError: contributions that do not fit together.
            MergeError: NaN or infinity, an integrity check that failed, the time is over, or no attempt succeeded.
                All ranks raise it.
            RunError: a rank does not answer; the run cannot go on.
        """
        return self._outcomes(contributions, {label: (None, None)}, label)[1][label]

    def merge_each(
        self, contributions: Sequence[Contribution], weights: Mapping[str, Mapping[str, float]], *, label: str
    ) -> Iterator[tuple[str, MergeOutcome]]:
        """A mixture of its own for every target, one after another.

        As :meth:`merge` for each target, with every state hashed once and sent once. In one process the next target is
        merged when it is asked for, so that one result is held at a time.

        Args:
            contributions: as of :meth:`merge`; their weights do not matter here.
            weights: target -> participant -> share; the same on every rank. Targets are participants.
            label: of this merge in the run.

        Yields:
            Target and outcome; spread, of this rank's participants.

        Raises:
            As :meth:`merge`.
        """
        wanted = {f"{label}, {target}": (shares, target) for target, shares in weights.items()}
        targets = {f"{label}, {target}": target for target in weights}
        if self._is_spread:
            for name, outcome in self._outcomes(contributions, wanted, label)[1].items():
                yield targets[name], outcome
            return
        inputs = None
        for name, job in wanted.items():
            merged, outcomes = self._outcomes(contributions, {name: job}, name, inputs)
            inputs = merged.inputs
            yield targets[name], outcomes[name]

    # Inside

    def _outcomes(
        self,
        contributions: Sequence[Contribution],
        wanted: Mapping[str, tuple[Mapping[str, float] | None, str | None]],
        label: str,
        inputs: _Inputs | None = None,
    ) -> tuple[_Merged, dict[str, MergeOutcome]]:
        """Outcomes by label, and what they are of.

        Args:
            contributions: of this rank.
            wanted: label -> weights (None for the contributions' own) and receiver.
            label: of all of it.
            inputs: the contributions' hashes, if they are known.
        """
        started = time.perf_counter()

        def once(deadline: Deadline) -> _Merged:
            return self._once(contributions, wanted, inputs, deadline)

        try:
            merged, attempts = attempt(
                once,
                what=f"merge {label}",
                max_attempts=self._max_attempts,
                timeout_seconds=self._timeout_seconds,
                is_spread=self._is_spread,
            )
        except MeldkitError as error:
            if not error.message.startswith(f"merge {label}: "):
                error.message = f"merge {label}: {error.message}"
            raise
        seconds = (time.perf_counter() - started) / max(len(merged.results), 1)
        outcomes = {
            name: MergeOutcome(
                state=combined.state,
                weights=dict(merged.jobs[name].weights),
                method=self.combination.name,
                seconds=seconds,
                attempts=attempts,
                input_sha256=merged.inputs.sha256,
                output_sha256=merged.output_sha256.get(name, ""),
                integrity=self._facts(merged, name),
                notes=self._notes(merged.jobs[name]),
            )
            for name, combined in merged.results.items()
        }
        return merged, outcomes

    def _once(
        self,
        contributions: Sequence[Contribution],
        wanted: Mapping[str, tuple[Mapping[str, float] | None, str | None]],
        inputs: _Inputs | None,
        deadline: Deadline,
    ) -> _Merged:
        """One attempt, on all ranks."""
        how = self._how(deadline)
        known = _union(
            how.agree(lambda: {c.participant: (c.weight, c.fisher is not None) for c in contributions})
        )
        order = [name for name in self._participants or known if name in known]
        own = {name: known[name][0] for name in order}
        jobs = {
            label: Job(label=label, weights=dict(own if weights is None else weights), receiver=target)
            for label, (weights, target) in wanted.items()
        }
        for job in jobs.values():
            self._check(job, known)
        if inputs is None:
            inputs = _Inputs(
                self._of_inputs(how, contributions, integrity.sha256_of, deadline),
                self._of_inputs(how, contributions, integrity.checksum_of, deadline),
            )
        merged = _Merged(jobs, inputs, how.merge(contributions, list(jobs.values())), {})
        if self._validate:
            checksums = self._of_inputs(how, contributions, integrity.checksum_of, deadline)
            integrity.check_unchanged(inputs.checksums, checksums)
            self._hash_results(how, merged)
        return merged

    def _how(self, deadline: Deadline) -> Here | Exchange:
        options: dict[str, Any] = {"base": self._base, "seed": self._seed, "validate": self._validate}
        if not self._is_spread:
            return Here(self.combination, deadline, **options)
        wire = Wire(deadline)
        options |= {"order": self._participants, "num_bytes": self._exchange_bytes}
        return Exchange(self.combination, wire, deadline, **options)

    def _check(self, job: Job, known: Mapping[str, Sequence[Any]]) -> None:
        """Whether a job can be done with these participants; the same on all ranks.

        Args:
            job: to check.
            known: participant -> its own weight, and whether it has brought a Fisher.
        """
        foreign = [name for name in job.weights if name not in known]
        if foreign or not known:
            raise InputError(f"there is no state of {', '.join(foreign) or 'any participant'} to merge")
        integrity.check_weights(job.weights)
        if self._validate:
            integrity.check_sum(job.weights)
        used = [name for name in job.weights if job.takes(name)]
        if len(used) == 1:
            return
        self.combination.check_number(len(used))
        without = [name for name in used if not known[name][1]]
        if self.combination.method.needs_fisher and without:
            raise InputError(
                f"{self.combination.method.name} weighs by a Fisher, which {', '.join(without)} did not bring"
            )

    def _of_inputs(
        self,
        how: Here | Exchange,
        contributions: Sequence[Contribution],
        function: Callable[[State], ValueT],
        deadline: Deadline,
    ) -> dict[str, ValueT]:
        """A function of every participant's state, on all ranks; of none without validation."""
        if not self._validate:
            return {}

        def own() -> dict[str, ValueT]:
            found = {}
            for entry in contributions:
                found[entry.participant] = function(entry.state)
                deadline.check()
            return found

        return _union(how.agree(own))

    def _hash_results(self, how: Here | Exchange, merged: _Merged) -> None:
        gathered = how.agree(
            lambda: {label: integrity.sha256_of(entry.state) for label, entry in merged.results.items()}
        )
        merged.output_sha256.update(_union(gathered))
        for label in merged.jobs:
            if len({found[label] for found in gathered if label in found}) > 1:
                raise MergeError(f"{label}: ranks received different results")

    def _facts(self, merged: _Merged, label: str) -> dict[str, Any]:
        """What was checked of one result, and what was measured."""
        facts: dict[str, Any] = {}
        if self._validate:
            passed = ("inputs_unchanged", "names_shapes_dtypes", "finite", "weights_add_up_to_1")
            facts |= dict.fromkeys(passed, True)
            names = self.combination.convex_names(merged.results[label].state)
            facts["inside_envelope"] = True if names or self._is_alone(merged.jobs[label]) else None
        if errors := merged.results[label].errors:
            facts["products"] = summary(errors)
        return facts

    def _notes(self, job: Job) -> list[str]:
        notes = list(self._notes_on_kind)
        if left_out := [name for name in job.weights if not job.takes(name)]:
            notes.append(f"left out, with weight 0: {', '.join(left_out)}")
        if self._is_alone(job):
            notes.append("one participant alone: its own state is the result")
        elif not self.combination.uses_weights:
            notes.append(f"{self.combination.method.name} takes no weights: they only say who takes part")
        return notes

    @staticmethod
    def _is_alone(job: Job) -> bool:
        return sum(job.takes(name) for name in job.weights) == 1


def _union(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for entry in entries for name, value in entry.items()}
