"""The Fisher information with which participants come to a merge."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.data.prepare import Prepared
from toolkit.rounds.merging import participant_fisher
from toolkit.rounds.participants import Participant

FROM_OPTIMIZER = "from_optimizer"
FROM_ROWS = ("fisher_dataset", "fisher")


class Fishers:
    """Fisher information of participants for one merge, each estimated once for the same rows.

    Args:
        config: the run's options (FisherOptions and ``merge_algorithm``).
        rows: of every locale that trains or is a target.
    """

    def __init__(self, config: Any, rows: Mapping[str, Prepared]) -> None:
        self._config = config
        self._rows = rows
        self._known: dict[tuple[str, tuple[str, ...]], Mapping[str, Any]] = {}

    @property
    def depend_on_target(self) -> bool:
        """Whether a participant's Fisher differs from target to target."""
        return self._config.merge_algorithm in FROM_ROWS and self._config.fisher_data_mode != "sources"

    def of(self, participant: Participant, targets: tuple[str, ...]) -> Mapping[str, Any] | None:
        """Tensors under the names of the participant's state; None where the algorithm takes no Fisher."""
        algorithm, mode = self._config.merge_algorithm, self._config.fisher_data_mode
        if algorithm == FROM_OPTIMIZER:
            return participant.trainer.second_moments()
        if algorithm not in FROM_ROWS:
            return None
        locales = {
            "target": targets,
            "sources": (participant.name,),
            "both": tuple(dict.fromkeys((participant.name, *targets))),
        }[mode]
        key = (participant.name, locales)
        if key not in self._known:
            self._known[key] = self._estimate(participant, locales)
        return self._known[key]

    def _estimate(self, participant: Participant, locales: Sequence[str]) -> Mapping[str, Any]:
        """Over training rows of all ``locales``, the same number of each: a held-out row must not help to train."""
        share = max(1, self._config.num_fisher_examples // len(locales))
        rows: list[Any] = []
        for locale in locales:
            train = self._rows[locale].train
            rows += [train[number] for number in _spread(len(train), share)]
        return participant_fisher(
            participant.trainer,
            rows,
            num_examples=len(rows),
            batch_size=self._config.fisher_batch_size,
            seed=self._config.seed,
        )


def _spread(num_rows: int, wanted: int) -> list[int]:
    """``wanted`` row numbers, evenly over all rows."""
    wanted = min(wanted, num_rows)
    return [i * num_rows // wanted for i in range(wanted)]
