"""One merge between two epochs: weights, Fisher information, the merge itself, the gate, and handing it out.

Every rank calls it with its own participants. All of them compute the same weights; states meet in the coordinator.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.prepare import Prepared
from toolkit.errors import InputError, MergeError
from toolkit.reporting.history import plain
from toolkit.reporting.records import MergeRecord
from toolkit.rounds.loop import score_of
from toolkit.rounds.merge_fishers import Fishers
from toolkit.rounds.merging import (
    Contribution,
    MergeCoordinator,
    MergeOutcome,
    slots_of_state,
    state_of_slots,
)
from toolkit.rounds.participants import Participant
from toolkit.rounds.run import Run
from toolkit.rounds.schedule import MergeDecision
from toolkit.rounds.weighting import combined, notes_on, weightings
from toolkit.rounds.weighting.registry import WeightingInputs
from toolkit.training.contract import ParticipantTrainer

Weights = dict[str, float]
Writer = Callable[[ParticipantTrainer, MergeOutcome, Sequence[str], int], Path]
"""Of (trainer whose model has the form, merge, targets, epoch): writes the merged model and returns its folder."""


@dataclass
class _Handed:
    """What one participant was offered, and what came of it."""

    participant: Participant
    outcome: MergeOutcome
    targets: tuple[str, ...]
    own: Mapping[str, Any]
    """Its state before."""
    before: dict[str, float]
    after: dict[str, float]
    verdict: str | None
    path: Path | None

    def as_dict(self) -> dict[str, Any]:
        outcome = self.outcome
        return {
            "targets": ",".join(self.targets),
            "weights": outcome.weights,
            "before": self.before,
            "after": self.after,
            "verdict": self.verdict,
            "path": None if self.path is None else str(self.path),
            "seconds": outcome.seconds,
            "attempts": outcome.attempts,
            "notes": outcome.notes,
            "digests": {"inputs": outcome.input_sha256, "output": outcome.output_sha256},
            "integrity": outcome.integrity,
        }


class MergeStep:
    """Merges the participants of a run where its schedule says so.

    Args:
        run: of the recipe.
        participants: of this rank, in the run's order.
        names: of the participants of all ranks.
        coordinator: merges states.
        moments: merges optimizer states (``--optimizer-on-merge merge``).
        rows: of every locale that trains or is a target.
        writer: of merged models.
    """

    def __init__(
        self,
        run: Run,
        participants: Sequence[Participant],
        names: Sequence[str],
        coordinator: MergeCoordinator,
        moments: MergeCoordinator,
        rows: Mapping[str, Prepared],
        writer: Writer,
    ) -> None:
        self.run = run
        self.config = run.config
        self.team = run.team
        self.participants = list(participants)
        self.names = list(names)
        self.coordinator = coordinator
        self.moments = moments
        self.rows = rows
        self._writer = writer

    def __call__(self, epoch: int, decision: MergeDecision) -> dict[str, bool]:
        mine = [p for p in self.participants if p.standing.status != "failed"]
        sources = self._in_order([p.name for p in mine])
        receivers = self._in_order([p.name for p in mine if p.is_active or _stopped_in(p, epoch)])
        steps = self._union({p.name: p.trainer.step for p in mine})
        if not receivers:
            self._record(epoch, decision, sources, steps, {}, None, left_out="nobody is left who trains")
            return {}
        states = {p.name: p.trainer.state() for p in mine}
        handed: list[_Handed] = []
        try:
            weights = self._all_weights(sources, receivers)
            for participant, targets, outcome in self._outcomes(epoch, mine, receivers, weights, states):
                is_written = self.config.merge_scope == "each" or participant.name == receivers[0]
                with self._failing_on_all_ranks():
                    path = self._writer(participant.trainer, outcome, targets, epoch) if is_written else None
                    handed.append(self._offer(participant, targets, outcome, states[participant.name], path))
            self._agree()
            error = None
        except MergeError as caught:
            error = caught
        accounts = self._union({h.participant.name: h.as_dict() for h in handed})
        if error is not None:
            for entry in handed:  # all of a merge, or nothing
                entry.participant.trainer.load_state(entry.own)
            self._record(epoch, decision, sources, steps, {}, error)
            if not self.config.enable_auto_recovery:
                raise error
            return {}
        self._settle(epoch, mine, handed)
        self._record(epoch, decision, sources, steps, accounts, None)
        return {name: entry["verdict"] != "rejected" for name, entry in accounts.items()}

    @contextmanager
    def _failing_on_all_ranks(self) -> Iterator[None]:
        """What fails on this rank is told at the others' next :meth:`_agree`, which raise it too."""
        try:
            yield
        except MergeError as error:
            self._agree(error)

    def _agree(self, error: MergeError | None = None) -> None:
        """On all ranks. Raises the MergeError of this one, or else of another."""
        said = self.team.gather(None if error is None else error.message)
        if error is not None:
            raise error
        for rank, message in enumerate(said):
            if message is not None:
                raise MergeError(f"{message} (on rank {rank})")

    # Weights

    def _all_weights(
        self, sources: Sequence[str], receivers: Sequence[str]
    ) -> dict[tuple[str, ...], Weights]:
        """Weights for the targets of every merged state that is wanted; the same on all ranks."""
        if self.config.merge_scope == "target":
            wanted = [tuple(self.config.targets)]
        else:
            wanted = [(name,) for name in receivers]
        accuracy = None
        if weightings()[self.config.weighting].needs_accuracy:
            accuracy = self._accuracies(dict.fromkeys(target for group in wanted for target in group))
        counts = {name: len(self.rows[name].train) for name in sources}
        found = {}
        for targets in wanted:
            found[targets] = combined(
                self.config.weighting,
                sources,
                targets,
                num_examples=counts,
                accuracy=accuracy,
                options=self.config,
            )
        self._say_notes(sources, wanted[0][0], counts, accuracy)
        return found

    def _say_notes(self, sources: Sequence[str], target: str, counts: Any, accuracy: Any) -> None:
        if not self.team.is_main:
            return
        inputs = WeightingInputs(
            sources=tuple(sources), target=target, num_examples=counts, accuracy=accuracy, options=self.config
        )
        for note in notes_on(self.config.weighting, inputs):
            self.run.say("info", note)

    def _accuracies(self, targets: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Each source's accuracy on each target's held-out rows; of a language model exp(-loss)."""
        own: dict[str, dict[str, float]] = {}
        for source in self.participants:
            if source.standing.status == "failed":
                continue
            own[source.name] = {}
            for target in targets:
                rows = self.rows[target].evaluation
                if rows is None:
                    raise InputError(
                        f"--weight-calculation performance needs held-out rows of {target}, and there are none"
                    )
                measured = source.trainer.evaluate(rows)
                own[source.name][target] = measured.get("accuracy", math.exp(-measured["loss"]))
        return self._union(own)

    # Merging

    def _outcomes(
        self,
        epoch: int,
        mine: Sequence[Participant],
        receivers: Sequence[str],
        weights: Mapping[tuple[str, ...], Weights],
        states: Mapping[str, Mapping[str, Any]],
    ) -> Iterator[tuple[Participant, tuple[str, ...], MergeOutcome]]:
        """Every participant of this rank that receives something, with what it receives."""
        fishers = Fishers(self.config, self.rows)
        label = f"epoch {epoch}"
        by_name = {p.name: p for p in mine if p.name in receivers}

        def contributions(targets: tuple[str, ...], shares: Weights) -> list[Contribution]:
            with self._failing_on_all_ranks():
                made = [
                    Contribution(
                        participant=p.name,
                        state=states[p.name],
                        weight=shares[p.name],
                        fisher=fishers.of(p, targets) if shares[p.name] or len(weights) > 1 else None,
                    )
                    for p in mine
                ]
            self._agree()
            return made

        if self.config.merge_scope == "target":
            ((targets, shares),) = weights.items()
            outcome = self.coordinator.merge(contributions(targets, shares), label=label)
            for participant in by_name.values():
                yield participant, targets, outcome
        elif fishers.depend_on_target:
            for targets, shares in weights.items():
                outcome = self.coordinator.merge(
                    contributions(targets, shares), label=f"{label}, {targets[0]}"
                )
                if targets[0] in by_name:
                    yield by_name[targets[0]], targets, outcome
        else:
            (first, *_) = weights.items()
            each = {targets[0]: shares for targets, shares in weights.items()}
            for target, outcome in self.coordinator.merge_each(contributions(*first), each, label=label):
                if target in by_name:
                    yield by_name[target], (target,), outcome

    # Handing out

    def _offer(
        self,
        participant: Participant,
        targets: tuple[str, ...],
        outcome: MergeOutcome,
        own: Mapping[str, Any],
        path: Path | None,
    ) -> _Handed:
        """Give a participant the merged state, measure it, and take it back where the gate rejects it."""
        trainer, before = participant.trainer, participant.standing.metrics
        trainer.load_state(outcome.state)
        after: dict[str, float] = {}
        if participant.has_rows_to_evaluate and self.config.eval_every != "never":
            after = trainer.evaluate()
        verdict = self._verdict(before, after) if self.config.merge_gate else None
        if verdict == "rejected":
            trainer.load_state(own)
        return _Handed(participant, outcome, targets, own, dict(before), after, verdict, path)

    def _verdict(self, before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
        old, new = score_of(before, self.config.metric), score_of(after, self.config.metric)
        if old is None or new is None:
            return None
        return "accepted" if new >= old - self.config.gate_tolerance else "rejected"

    def _settle(self, epoch: int, mine: Sequence[Participant], handed: Sequence[_Handed]) -> None:
        """The merge is good: standings and optimizers follow."""
        taken = [entry for entry in handed if entry.verdict != "rejected"]
        for entry in taken:
            entry.participant.standing.num_merges += 1
            entry.participant.standing.metrics = entry.after
        if self.config.optimizer_on_merge == "reset":
            for entry in taken:
                entry.participant.trainer.reset_optimizer()
        elif self.config.optimizer_on_merge == "merge":
            self._merge_moments(epoch, mine, handed, taken)

    def _merge_moments(
        self, epoch: int, mine: Sequence[Participant], handed: Sequence[_Handed], taken: Sequence[_Handed]
    ) -> None:
        """Optimizers' moments become their mean, by the weights with which the states were merged."""
        weights = self._union({h.participant.name: h.outcome.weights for h in handed})
        contributions = [
            Contribution(
                participant=p.name,
                state=state_of_slots(p.trainer.optimizer_state()),
                weight=next(iter(weights.values()))[p.name],
            )
            for p in mine
        ]
        label = f"epoch {epoch}, optimizer"
        takers = {entry.participant.name: entry.participant.trainer for entry in taken}
        if self.config.merge_scope == "target":
            merged = slots_of_state(self.moments.merge(contributions, label=label).state)
            for trainer in takers.values():
                trainer.load_optimizer_state(merged)
            return
        for name, outcome in self.moments.merge_each(contributions, weights, label=label):
            if name in takers:
                takers[name].load_optimizer_state(slots_of_state(outcome.state))

    # Records

    def _record(
        self,
        epoch: int,
        decision: MergeDecision,
        sources: Sequence[str],
        steps: Mapping[str, int],
        accounts: Mapping[str, Mapping[str, Any]],
        error: MergeError | None,
        left_out: str | None = None,
    ) -> None:
        if not self.team.is_main:
            return
        mixtures = {entry["targets"]: entry for entry in accounts.values()}
        paths = {entry["targets"]: entry["path"] for entry in accounts.values() if entry["path"]}
        attempts = [entry["attempts"] for entry in accounts.values()]
        if error is not None:
            attempts.append(error.num_attempts)
        record = MergeRecord(
            round=epoch,
            epoch=epoch,
            steps=steps,
            participants=list(sources),
            method=self.config.merge_algorithm,
            status="failed" if error is not None else "skipped" if left_out else "merged",
            weights={targets: entry["weights"] for targets, entry in mixtures.items()},
            reason=decision.reason,
            trigger=decision.trigger,
            confidence=decision.confidence,
            decision_metrics=decision.metrics,
            gate={name: entry["verdict"] for name, entry in accounts.items()},
            before={name: entry["before"] for name, entry in accounts.items()},
            after={name: entry["after"] for name, entry in accounts.items()},
            seconds=sum(entry["seconds"] for entry in mixtures.values()),
            attempts=max(attempts, default=0),
            path=next(iter(paths.values()), None),
            error=left_out if error is None else error.message,
            notes=list(dict.fromkeys(note for entry in mixtures.values() for note in entry["notes"])),
        )
        self.run.journal.append("merge", **_facts(record, mixtures, paths))
        self.run.listener.handle(record)

    def _union(self, own: dict[str, Any]) -> dict[str, Any]:
        return self.team.collect(own, self.names)

    def _in_order(self, own: Sequence[str]) -> list[str]:
        return list(self._union(dict.fromkeys(own)))


def _stopped_in(participant: Participant, epoch: int) -> bool:
    """Whether it trained in this epoch and stopped early at its end: it still receives this merge."""
    return participant.trainer.step == epoch * participant.trainer.num_steps_per_epoch


def _facts(
    record: MergeRecord, mixtures: Mapping[str, Mapping[str, Any]], paths: Mapping[str, str]
) -> dict[str, Any]:
    """What the journal keeps of a merge."""
    return {
        "epoch": record.epoch,
        "status": record.status,
        "method": record.method,
        "participants": record.participants,
        "weights": record.weights,
        "gate": record.gate,
        "before": plain(record.before),
        "after": plain(record.after),
        "attempts": record.attempts,
        "paths": {targets: Path(path).name for targets, path in paths.items()},
        "error": record.error,
        "digests": {targets: entry["digests"] for targets, entry in mixtures.items()},
        "integrity": {targets: plain(entry["integrity"]) for targets, entry in mixtures.items()},
    }
