"""One merge between two epochs: weights, Fisher information, the merge itself, the gate, and handing it out."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from toolkit.data.prepare import Prepared
from toolkit.errors import InputError, MergeError
from toolkit.reporting.history import plain
from toolkit.reporting.records import MergeRecord
from toolkit.rounds.loop import score_of
from toolkit.rounds.merging import (
    Contribution,
    MergeCoordinator,
    MergeOutcome,
    merge_optimizer_states,
    participant_fisher,
)
from toolkit.rounds.participants import Participant
from toolkit.rounds.run import Run
from toolkit.rounds.schedule import MergeDecision
from toolkit.rounds.weighting import combined, weightings
from toolkit.training.contract import ParticipantTrainer

logger = logging.getLogger(__name__)

State = Mapping[str, Any]
Writer = Callable[[ParticipantTrainer, MergeOutcome, tuple[str, ...], int], Path]
"""Of (trainer whose model has the form, merge, targets, epoch): writes the merged model and returns its folder."""


@dataclass
class _Mixture:
    """One merged state of a merge, and who receives it."""

    receivers: list[Participant]
    targets: tuple[str, ...]
    weights: dict[str, float]
    outcome: MergeOutcome
    path: Path | None = None
    """Folder of the merged model."""


@dataclass
class _Account:
    """What is recorded of one merge."""

    gate: dict[str, str | None] = field(default_factory=dict)
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)


class MergeStep:
    """Merges the participants of a run where its schedule says so.

    Args:
        run: of the recipe.
        participants: of the loop, in their order.
        coordinator: merges states.
        target_rows: prepared rows of the target languages that no participant has.
        writer: of merged models.
    """

    def __init__(
        self,
        run: Run,
        participants: Sequence[Participant],
        coordinator: MergeCoordinator,
        target_rows: Mapping[str, Prepared],
        writer: Writer,
    ) -> None:
        self.run = run
        self.config = run.config
        self.participants = list(participants)
        self.coordinator = coordinator
        self.target_rows = target_rows
        self._writer = writer

    def __call__(self, epoch: int, decision: MergeDecision) -> dict[str, bool]:
        sources = [p for p in self.participants if p.standing.status != "failed"]
        receivers = [p for p in sources if p.is_active or self._is_over(p, epoch)]
        began = time.monotonic()
        states = {p.name: p.trainer.state() for p in sources}
        try:
            mixtures = self._merge(epoch, sources, receivers, states)
        except MergeError as error:
            self._record(epoch, decision, sources, [], _Account(), time.monotonic() - began, error=error)
            if not self.config.enable_auto_recovery:
                raise
            return {}
        seconds = time.monotonic() - began
        account = _Account()
        optimizers = self._optimizers(sources) if self.config.optimizer_on_merge == "merge" else {}
        for mixture in mixtures:
            for participant in mixture.receivers:
                self._hand_out(epoch, participant, mixture, states[participant.name], optimizers, account)
        self._record(epoch, decision, sources, mixtures, account, seconds)
        return {name: verdict != "rejected" for name, verdict in account.gate.items()}

    def _is_over(self, participant: Participant, epoch: int) -> bool:
        """Whether it trained in this epoch and stopped early at its end: it still receives this merge."""
        return participant.trainer.step == epoch * participant.trainer.num_steps_per_epoch

    # Merging

    def _merge(
        self,
        epoch: int,
        sources: Sequence[Participant],
        receivers: Sequence[Participant],
        states: Mapping[str, State],
    ) -> list[_Mixture]:
        if self.config.merge_scope == "target":
            wanted = [(list(receivers), tuple(self.config.targets))]
        else:
            wanted = [([p], (p.name,)) for p in receivers]
        fishers = _Fishers(self, sources)
        mixtures = []
        for group, targets in wanted:
            weights = self.weights(sources, targets)
            contributions = [
                Contribution(
                    participant=p.name,
                    state=states[p.name],
                    weight=weights[p.name],
                    fisher=fishers.of(p, targets) if weights[p.name] else None,
                )
                for p in sources
            ]
            names = targets if self.config.merge_scope == "each" else [p.name for p in sources]
            outcome = self.coordinator.merge(contributions, label=f"epoch {epoch}, {', '.join(names)}")
            mixtures.append(_Mixture(group, targets, outcome.weights, outcome))
        return mixtures

    def weights(self, sources: Sequence[Participant], targets: Sequence[str]) -> dict[str, float]:
        """The weight of each source for a merged state toward ``targets``: the mean over them."""
        needs_accuracy = weightings()[self.config.weighting].needs_accuracy
        return combined(
            self.config.weighting,
            [p.name for p in sources],
            targets,
            num_examples={p.name: len(p.prepared.train) for p in sources},
            accuracy=self._accuracies(sources, targets) if needs_accuracy else None,
            options=self.config,
        )

    def _accuracies(
        self, sources: Sequence[Participant], targets: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Each source's accuracy on each target's held-out rows; of a language model exp(-loss)."""
        found: dict[str, dict[str, float]] = {}
        for source in sources:
            found[source.name] = {}
            for target in targets:
                rows = self.rows_of(target).evaluation
                if rows is None:
                    raise InputError(
                        f"--weight-calculation performance needs held-out rows of {target}, and there are none"
                    )
                measured = source.trainer.evaluate(rows)
                found[source.name][target] = measured.get("accuracy", math.exp(-measured["loss"]))
        return found

    def rows_of(self, locale: str) -> Prepared:
        """The prepared rows of a participant or of a target language."""
        for participant in self.participants:
            if participant.name == locale:
                return participant.prepared
        return self.target_rows[locale]

    def _optimizers(self, sources: Sequence[Participant]) -> dict[str, Any]:
        return {p.name: p.trainer.optimizer_state() for p in sources}

    # Handing out

    def _hand_out(
        self,
        epoch: int,
        participant: Participant,
        mixture: _Mixture,
        own: State,
        optimizers: Mapping[str, Any],
        account: _Account,
    ) -> None:
        trainer, name, standing = participant.trainer, participant.name, participant.standing
        before = standing.metrics
        trainer.load_state(mixture.outcome.state)
        if mixture.path is None:
            mixture.path = self._writer(trainer, mixture.outcome, mixture.targets, epoch)
        after: dict[str, float] = {}
        if participant.has_rows_to_evaluate and self.config.eval_every != "never":
            after = trainer.evaluate()
        account.before[name], account.after[name] = dict(before), after
        verdict = self._verdict(before, after) if self.config.merge_gate else None
        account.gate[name] = verdict
        if verdict == "rejected":
            trainer.load_state(own)
            return
        standing.num_merges += 1
        standing.metrics = after
        if self.config.optimizer_on_merge == "reset":
            trainer.reset_optimizer()
        elif self.config.optimizer_on_merge == "merge":
            used = {source: weight for source, weight in mixture.weights.items() if weight}
            slots = [optimizers[source] for source in used]
            trainer.load_optimizer_state(merge_optimizer_states(slots, list(used.values())))

    def _verdict(self, before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
        old, new = score_of(before, self.config.metric), score_of(after, self.config.metric)
        if old is None or new is None:
            return None
        return "accepted" if new >= old - self.config.gate_tolerance else "rejected"

    # Records

    def _record(
        self,
        epoch: int,
        decision: MergeDecision,
        sources: Sequence[Participant],
        mixtures: Sequence[_Mixture],
        account: _Account,
        seconds: float,
        *,
        error: MergeError | None = None,
    ) -> None:
        attempts = sum(m.outcome.attempts for m in mixtures) if mixtures else self.config.max_merge_attempts
        record = MergeRecord(
            round=epoch,
            epoch=epoch,
            steps={p.name: p.trainer.step for p in sources},
            participants=[p.name for p in sources],
            method=self.config.merge_algorithm,
            status="failed" if error is not None else "merged",
            weights={",".join(m.targets): m.weights for m in mixtures},
            reason=decision.reason,
            trigger=decision.trigger,
            confidence=decision.confidence,
            decision_metrics=decision.metrics,
            gate=account.gate,
            before=account.before,
            after=account.after,
            seconds=seconds,
            attempts=attempts,
            path=next((str(m.path) for m in mixtures if m.path is not None), None),
            error=None if error is None else error.message,
            notes=list(dict.fromkeys(chain.from_iterable(m.outcome.notes for m in mixtures))),
        )
        self.run.journal.append(
            "merge",
            epoch=epoch,
            status=record.status,
            method=record.method,
            participants=record.participants,
            weights=record.weights,
            gate=record.gate,
            before=plain(record.before),
            after=plain(record.after),
            attempts=attempts,
            paths={",".join(m.targets): m.path.name for m in mixtures if m.path is not None},
            error=record.error,
            digests={
                ",".join(m.targets): {"inputs": m.outcome.input_sha256, "output": m.outcome.output_sha256}
                for m in mixtures
            },
            integrity={",".join(m.targets): m.outcome.integrity for m in mixtures},
        )
        self.run.listener.handle(record)


class _Fishers:
    """The Fisher information of the sources of one merge, each estimated once for the same rows."""

    def __init__(self, step: MergeStep, sources: Sequence[Participant]) -> None:
        self._step = step
        self._config = step.config
        self._known: dict[tuple[str, tuple[str, ...]], State] = {}

    def of(self, participant: Participant, targets: tuple[str, ...]) -> State | None:
        algorithm, mode = self._config.merge_algorithm, self._config.fisher_data_mode
        if algorithm == "from_optimizer":
            return participant.trainer.second_moments()
        if algorithm not in ("fisher_dataset", "fisher"):
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

    def _estimate(self, participant: Participant, locales: Sequence[str]) -> State:
        """Over the training rows of all ``locales``, the same number of each: a held-out row must not help to train."""
        config = self._config
        share = max(1, config.num_fisher_examples // len(locales))
        rows: list[Any] = []
        for locale in locales:
            train = self._step.rows_of(locale).train
            rows += [train[i] for i in _spread(len(train), share)]
        return participant_fisher(
            participant.trainer,
            rows,
            num_examples=len(rows),
            batch_size=config.fisher_batch_size,
            seed=config.seed,
        )


def _spread(num_rows: int, wanted: int) -> list[int]:
    """``wanted`` row numbers, evenly over all rows."""
    wanted = min(wanted, num_rows)
    return [i * num_rows // wanted for i in range(wanted)]
