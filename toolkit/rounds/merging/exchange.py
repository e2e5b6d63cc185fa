"""Merging participants that are spread over ranks: no rank ever holds all states.

Every rank has the states of its own participants. States are cut into buckets; each bucket has one owner, which
receives it of all participants, merges it by the call that merges whole states in one process, and sends the result on.
Ranks own buckets in turn, so all of them merge at once. States are taken in the run's order of participants, whatever
rank they are on, and all facts about whole Fishers are known everywhere: the result has the bits of one process.

Beside its own states and its own results a rank holds a bucket of each participant. A tensor that a method needs whole
(TIES ranks all of its elements) is not cut; there the largest tensor is the bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from toolkit.errors import InputError, MeldkitError, MergeError, ModelError
from toolkit.merging.memory import FisherMeasures, measure_fisher
from toolkit.merging.states import State
from toolkit.rounds.merging import integrity, tied
from toolkit.rounds.merging.attempts import Deadline, is_transient
from toolkit.rounds.merging.buckets import Bucket, Buffers, Kind, Layout, cut, part_of
from toolkit.rounds.merging.combination import Combination, Combined, Job, Part, seed_of
from toolkit.rounds.merging.contribution import Contribution
from toolkit.rounds.merging.factors import ProductError
from toolkit.rounds.merging.wire import Wire

ValueT = TypeVar("ValueT")

# Bytes that the buckets of all participants take together on their owner.
NUM_BYTES = 128 * 2**20
ERRORS = {kind.__name__: kind for kind in (InputError, ModelError, MergeError)}


class FailedOnRank(OSError):
    """Another rank ran out of memory, or the like: all try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all ranks know of a merge before tensors travel.

    Attributes:
        owners: participant -> rank, in the run's order.
        kinds: of the tensors of a state, without repeated names.
        names: of a state, with them.
        repeated: names of tensors that are others' too.
        fisher_kinds: participant -> what its Fisher covers.
        measures: participant -> of its whole Fisher.
        buckets: of all names.
    """

    owners: dict[str, int]
    kinds: dict[str, Kind]
    names: list[str]
    repeated: dict[str, str]
    fisher_kinds: dict[str, dict[str, Kind]]
    measures: dict[str, FisherMeasures]
    buckets: list[list[Any]] = field(default_factory=list)


class Exchange:
    """One merge over the ranks of a group; every rank makes one and calls :meth:`merge` with the same jobs.

    Args:
        combination: how to merge.
        wire: to the other ranks.
        deadline: of the merge.
        order: of all participants of the run.
        base: theta_0, whole, on every rank.
        seed: of the run.
        validate: check every merged bucket.
        num_bytes: that the buckets of all participants may take on their owner.
    """

    def __init__(
        self,
        combination: Combination,
        wire: Wire,
        deadline: Deadline,
        *,
        order: Sequence[str],
        base: State | None,
        seed: int,
        validate: bool,
        num_bytes: int,
    ) -> None:
        self._combination, self._wire, self._deadline = combination, wire, deadline
        self._order, self._base, self._seed = order, base, seed
        self._validate, self._num_bytes = validate, num_bytes
        self._buffers = Buffers(wire.device)
        self._mine: dict[str, State] = {}
        self._my_fishers: dict[str, State] = {}

    def merge(self, contributions: Sequence[Contribution], jobs: Sequence[Job]) -> dict[str, Combined]:
        """Do all jobs.

        Args:
            contributions: of this rank's participants; their weights do not matter here.
            jobs: the same on every rank.

        Returns:
            By label, the results that this rank receives.

        Raises:
            InputError, ModelError, MergeError: on all ranks alike.
            RunError: a rank does not answer; the ranks are then out of step.
        """
        plan = self._plan(contributions)
        device = next((t.device for s in self._mine.values() for t in s.values()), self._wire.device)
        mine = [job for job in jobs if self._wire.rank in self._receivers(job, plan)]
        results = {
            job.label: Combined(
                {name: torch.empty(k.shape, dtype=k.dtype, device=device) for name, k in plan.kinds.items()}
            )
            for job in mine
        }
        for first in range(0, len(plan.buckets), self._wire.num_ranks):
            self._turn(plan, plan.buckets[first : first + self._wire.num_ranks], jobs, results, device)
        return {
            label: Combined(tied.restored(entry.state, plan.repeated, plan.names), entry.errors)
            for label, entry in results.items()
        }

    def agree(self, function: Callable[[], ValueT]) -> list[ValueT]:
        """What the function returns on each rank, as JSON values; what it raises on one rank is raised on all."""
        error: Exception | None = None
        answer: dict[str, Any] = {}
        try:
            answer["value"] = function()
        except Exception as caught:
            error = caught
            answer["error"] = _described(caught)
        answers = self._wire.gather(answer)
        if error is not None:
            raise error
        for rank, other in enumerate(answers):
            if "error" in other:
                raise _raised(other["error"], rank)
        return [other["value"] for other in answers]

    # Facts

    def _plan(self, contributions: Sequence[Contribution]) -> Plan:
        order = self._order
        facts = self.agree(lambda: self._facts(contributions))
        owners = {name: rank for rank, entry in enumerate(facts) for name in entry["participants"]}
        known = [entry for entry in facts if entry["participants"]]
        counted = sum(len(entry["participants"]) for entry in facts)
        if counted != len(owners) or not set(owners) <= set(order) or not known:
            raise InputError(
                f"the ranks bring {', '.join(n for e in facts for n in e['participants']) or 'no participant'}; "
                f"each participant is on one rank, and the run has {', '.join(order)}"
            )
        if any(entry["kinds"] != known[0]["kinds"] for entry in known):
            raise ModelError(
                "the states of participants on different ranks differ in names, shapes or dtypes"
            )
        repeated = {
            name: other
            for name, other in known[0]["tied"].items()
            if all(entry["tied"].get(name) == other for entry in known)
        }
        names = list(known[0]["kinds"])
        kinds = {n: Kind.from_json(k) for n, k in known[0]["kinds"].items() if n not in repeated}
        self._mine = {c.participant: tied.without(c.state, repeated) for c in contributions}
        self._my_fishers = {}
        if self._combination.method.needs_fisher:
            self._my_fishers = {c.participant: tied.without(c.fisher or {}, repeated) for c in contributions}
        measures = self.agree(lambda: {name: measure_fisher(f) for name, f in self._my_fishers.items()})
        return Plan(
            owners={name: owners[name] for name in order if name in owners},
            kinds=kinds,
            names=names,
            repeated=repeated,
            fisher_kinds=self._gathered_kinds(),
            measures={name: _pairs(found) for entry in measures for name, found in entry.items()},
            buckets=cut(
                self._combination.units(list(kinds)),
                kinds,
                num_bytes=max(self._num_bytes // len(owners), 1),
                divisible=self._combination.is_elementwise,
            ),
        )

    def _facts(self, contributions: Sequence[Contribution]) -> dict[str, Any]:
        states = {entry.participant: entry.state for entry in contributions}
        if len(states) < len(contributions):
            raise InputError("a participant brings two states")
        integrity.check_alike(states)
        integrity.check_fishers(contributions)
        first = contributions[0].state if contributions else {}
        is_tied = contributions and not self._combination.is_lora
        fishers = [entry.fisher or {} for entry in contributions]
        return {
            "participants": list(states),
            "kinds": {name: Kind.of(tensor).as_json() for name, tensor in first.items()},
            "tied": tied.tied_names(list(states.values()), fishers) if is_tied else {},
        }

    def _gathered_kinds(self) -> dict[str, dict[str, Kind]]:
        own = {
            participant: {name: Kind.of(tensor).as_json() for name, tensor in fisher.items()}
            for participant, fisher in self._my_fishers.items()
        }
        return {
            participant: {name: Kind.from_json(kind) for name, kind in kinds.items()}
            for entry in self._wire.gather(own)
            for participant, kinds in entry.items()
        }

    def _receivers(self, job: Job, plan: Plan) -> list[int]:
        if job.receiver is None:
            return list(range(self._wire.num_ranks))
        return [plan.owners[job.receiver]]

    # Tensors

    def _turn(
        self,
        plan: Plan,
        buckets: Sequence[Bucket],
        jobs: Sequence[Job],
        results: Mapping[str, Combined],
        device: torch.device,
    ) -> None:
        """Merge one bucket on each rank, and hand the results out."""
        self._deadline.check()
        self._buffers.reset()
        used = [name for name in plan.owners if any(job.takes(name) for job in jobs)]
        states, fishers = self._collect(plan, buckets, used, device)
        merged: dict[str, Combined] = {}

        def merge_own() -> dict[str, dict[str, tuple[float, float]]]:
            if self._wire.rank < len(buckets):
                for job in jobs:
                    merged[job.label] = self._merge(plan, buckets[self._wire.rank], job, states, fishers)
            return {
                label: {module: (e.error, e.norm) for module, e in entry.errors.items()}
                for label, entry in merged.items()
            }

        for errors in self.agree(merge_own):
            for label, found in errors.items():
                if label in results:
                    results[label].errors.update({m: ProductError(*e) for m, e in found.items()})
        self._hand_out(plan, buckets, jobs, merged, results)

    def _collect(
        self, plan: Plan, buckets: Sequence[Bucket], used: Sequence[str], device: torch.device
    ) -> tuple[dict[str, State], dict[str, State]]:
        """This rank's bucket of all participants, theirs and their Fishers'."""
        wire = self._wire
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[tuple[dict[str, State], str, Layout, Tensor]] = []
        states: dict[str, State] = {}
        fishers: dict[str, State] = {}
        for owner, bucket in enumerate(buckets):
            for name in used:
                parts = [(self._mine, states, Layout(bucket, plan.kinds))]
                if self._combination.method.needs_fisher:
                    parts.append((self._my_fishers, fishers, Layout(bucket, plan.fisher_kinds[name])))
                for held, collected, layout in parts:
                    if name in held and owner == wire.rank:
                        collected[name] = part_of(held[name], bucket)
                    elif name in held:
                        buffer = self._buffers.take(layout.num_bytes)
                        layout.pack(held[name], buffer)
                        sends.append((buffer, owner))
                    elif owner == wire.rank:
                        buffer = self._buffers.take(layout.num_bytes)
                        receives.append((buffer, plan.owners[name]))
                        arriving.append((collected, name, layout, buffer))
        wire.exchange(sends, receives)
        for collected, name, layout, buffer in arriving:
            collected[name] = layout.unpack(buffer, device)
        return states, fishers

    def _merge(
        self, plan: Plan, bucket: Bucket, job: Job, states: Mapping[str, State], fishers: Mapping[str, State]
    ) -> Combined:
        names = [name for name in plan.owners if job.takes(name)]
        part = Part(
            states=[states[name] for name in names],
            weights=[job.weights[name] for name in names],
            fisher=[fishers[name] for name in names] if fishers else [],
            measures=[plan.measures[name] for name in names] if fishers else [],
            base=None if self._base is None else part_of(self._base, bucket),
            seed=seed_of(self._seed, job.label),
            on_progress=self._deadline.check,
        )
        try:
            combined = self._combination.combine(part)
            if self._validate:
                integrity.check_part(self._combination, part, combined.state)
        except MeldkitError as error:
            error.message = integrity.with_names(error.message, names)
            raise
        return combined

    def _hand_out(
        self,
        plan: Plan,
        buckets: Sequence[Bucket],
        jobs: Sequence[Job],
        merged: Mapping[str, Combined],
        results: Mapping[str, Combined],
    ) -> None:
        wire = self._wire
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[tuple[Layout, Tensor, str]] = []
        for owner, bucket in enumerate(buckets):
            layout = Layout(bucket, plan.kinds)
            for job in jobs:
                if owner == wire.rank:
                    buffer = self._buffers.take(layout.num_bytes)
                    layout.pack_part(merged[job.label].state, buffer)
                    sends += [(buffer, rank) for rank in self._receivers(job, plan) if rank != wire.rank]
                    if job.label in results:
                        arriving.append((layout, buffer, job.label))
                elif job.label in results:
                    buffer = self._buffers.take(layout.num_bytes)
                    receives.append((buffer, owner))
                    arriving.append((layout, buffer, job.label))
        wire.exchange(sends, receives)
        for layout, buffer, label in arriving:
            layout.write(buffer, results[label].state)


def _pairs(found: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (norm, mean) for name, (norm, mean) in found.items()}


def _described(error: Exception) -> dict[str, Any]:
    is_final = not is_transient(error)
    if is_final and isinstance(error, MeldkitError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {
        "kind": "" if is_final else "transient",
        "message": f"{type(error).__name__}: {error}",
        "hint": None,
    }


def _raised(described: Mapping[str, Any], rank: int) -> Exception:
    message = f"{described['message']} (on rank {rank})"
    if described["kind"] == "transient":
        return FailedOnRank(message)
    return ERRORS.get(described["kind"], MergeError)(message, hint=described["hint"])
