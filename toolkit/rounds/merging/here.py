"""Merging participants that are all in this process: what :mod:`toolkit.rounds.merging.exchange` does over ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from toolkit.errors import MeldkitError
from toolkit.merging.memory import measure_fisher
from toolkit.merging.states import State
from toolkit.rounds.merging import integrity, tied
from toolkit.rounds.merging.attempts import Deadline
from toolkit.rounds.merging.combination import Combination, Combined, Job, Part, seed_of
from toolkit.rounds.merging.contribution import Contribution

ValueT = TypeVar("ValueT")


class Here:
    """Merges in one process.

    Args:
        combination: how to merge.
        deadline: of the merge.
        base: theta_0.
        seed: of the run.
        validate: check what is merged.
    """

    def __init__(
        self, combination: Combination, deadline: Deadline, *, base: State | None, seed: int, validate: bool
    ) -> None:
        self._combination, self._deadline = combination, deadline
        self._base, self._seed, self._validate = base, seed, validate

    def agree(self, function: Callable[[], ValueT]) -> list[ValueT]:
        """What the function returns, in a list: of all ranks, where there are several."""
        return [function()]

    def merge(self, contributions: Sequence[Contribution], jobs: Sequence[Job]) -> dict[str, Combined]:
        """The results of all jobs by label.

        Raises:
            InputError, ModelError, MergeError: as :meth:`Combination.combine`; a check that failed.
        """
        return {job.label: self._merge(contributions, job) for job in jobs}

    def _merge(self, contributions: Sequence[Contribution], job: Job) -> Combined:
        used = [entry for entry in contributions if job.takes(entry.participant)]
        states = [entry.state for entry in used]
        integrity.check_alike({entry.participant: entry.state for entry in used})
        integrity.check_fishers(used)
        fishers: list[State] = []
        if self._combination.method.needs_fisher and len(used) > 1:
            fishers = [entry.fisher or {} for entry in used]
        repeated = {} if self._combination.is_lora else tied.tied_names(states, fishers)
        fishers = [tied.without(fisher, repeated) for fisher in fishers]
        part = Part(
            states=[tied.without(state, repeated) for state in states],
            weights=[job.weights[entry.participant] for entry in used],
            fisher=fishers,
            measures=[measure_fisher(fisher) for fisher in fishers],
            base=None if self._base is None else tied.without(self._base, repeated),
            seed=seed_of(self._seed, job.label),
            on_progress=self._deadline.check,
        )
        try:
            combined = self._combination.combine(part)
            if self._validate:
                integrity.check_part(self._combination, part, combined.state)
        except MeldkitError as error:
            error.message = integrity.with_names(error.message, [entry.participant for entry in used])
            raise
        return Combined(tied.restored(combined.state, repeated, list(states[0])), combined.errors)
