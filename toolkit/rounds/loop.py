"""The loop of all recipes with several participants: train an epoch each, decide, merge, commit; again.

    for every epoch:                                    (every rank does so with its own participants)
        every active participant trains one epoch       (its trainer is paused, not torn down, in between)
        every active participant is evaluated           -> observations
        the schedule decides                            -> a decision with its reason
        if it says so, states are merged and handed out (``merge_step``)
        everything is committed                         -> the place from which a killed run goes on

A commit is a set of checkpoints, one a participant, and one line of the journal that names them all together with what
else the loop knows (standings, schedule). What happened after the last commit is taken back and done again.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from toolkit.errors import CheckpointError, Interrupted, RunError
from toolkit.launch.status import say_task
from toolkit.reporting.records import AlertRecord, CheckpointRecord, RoundRecord
from toolkit.rounds.boundaries import Boundaries
from toolkit.rounds.killed_workers import killings_of, num_recoveries
from toolkit.rounds.participants import Participant, Standing
from toolkit.rounds.run import Run
from toolkit.rounds.schedule import MergeDecision, Observation, Schedule
from toolkit.rounds.schedule.early_stopping import EarlyStopping

logger = logging.getLogger(__name__)

COMMIT = "loop"
"""The journal's event for a commit of a loop."""


class Merge(Protocol):
    """Combines what the participants have learned and hands it out."""

    def __call__(self, epoch: int, decision: MergeDecision) -> Mapping[str, bool]:
        """Returns, for each participant that was offered a merged state, whether it took it over."""
        ...


class RoundLoop:
    """Trains participants epoch by epoch.

    Args:
        run: of the recipe: journal, listeners, stop request.
        participants: of this rank, with trainers that have not started.
        names: of the participants of all ranks, in the run's order; None for ``participants``.
        name: of this loop in the journal, where a run has several.
        num_epochs: of every participant.
        schedule: decides after every epoch whether to merge; None: never.
        merge: does it.
        rebuild: a new trainer, not started, for a participant whose trainer has failed.
    """

    def __init__(
        self,
        run: Run,
        participants: Sequence[Participant],
        *,
        name: str,
        num_epochs: int,
        names: Sequence[str] | None = None,
        schedule: Schedule | None = None,
        merge: Merge | None = None,
        rebuild: Callable[[Participant], None] | None = None,
    ) -> None:
        self.run = run
        self.config = run.config
        self.team = run.team
        self.participants = list(participants)
        self.names = [p.name for p in participants] if names is None else list(names)
        self.name = name
        self.num_epochs = num_epochs
        self.schedule = schedule
        self.merge = merge
        self.epoch = 0
        """Epochs that are over, merge included."""
        self._rebuild = rebuild
        self._is_new = True

    # Where it stands

    def commits(self) -> list[dict[str, Any]]:
        return [record for record in self.run.journal.records(COMMIT) if record["loop"] == self.name]

    def steps_of(self, commit: dict[str, Any] | None) -> dict[str, int]:
        """Optimizer steps of each participant at a commit."""
        return {name: 0 if commit is None else commit["steps"][name] for name in self.names}

    def last_intact_commit(self) -> dict[str, Any] | None:
        """The newest commit whose checkpoints are all intact; None where nothing was committed.

        Raises:
            CheckpointError: there were commits and none is intact: the run must not begin again unnoticed.
        """
        commits = self.commits()
        for commit in reversed(commits):
            if all(self.team.gather(self._is_intact(commit))):
                return commit
        if commits:
            raise CheckpointError(
                f"no commit of {self.run.directory.path} has all its checkpoints intact",
                hint="start again in another --output-dir",
            )
        return None

    def _is_intact(self, commit: dict[str, Any]) -> bool:
        try:
            for participant in self.participants:
                self._checkpoint(participant, commit)
        except CheckpointError as error:
            logger.warning("%s; falling back to the commit before it", error)
            return False
        return True

    def start(self, commit: dict[str, Any] | None) -> None:
        """Start the trainers, from a commit if one is given; what was recorded after it is taken back."""
        for participant in self.participants:
            participant.store.recover()
            folder = None if commit is None else self._checkpoint(participant, commit)
            participant.store.forget_behind(None if folder is None else folder.name)
            if commit is not None:
                participant.standing = Standing(**commit["standings"][participant.name])
            participant.trainer.start(folder)
        if commit is None:
            return
        self._is_new = False
        self.epoch = commit["epoch"]
        if self.schedule is not None:
            self.schedule.load_state(commit["schedule"])

    def _checkpoint(self, participant: Participant, commit: dict[str, Any]) -> Any:
        name = commit["checkpoints"][participant.name]
        return None if name is None else participant.store.find(name)

    # The loop

    def go(self, before: Callable[[Participant], object] | None = None) -> None:
        """Train to the end.

        Args:
            before: called for every participant before its first step.

        Raises:
            Interrupted: a stop was asked for; everything is committed.
            RunError: every participant has failed, or a merge has and --enable-auto-recovery is off.
        """
        for participant in self.participants:
            self._count_killings(participant)
        if self._is_new:
            for participant in self.participants:
                if before is not None:
                    before(participant)
                self._evaluate(participant, "before")
        while self.epoch < self.num_epochs and self._someone_trains():
            began = time.monotonic()
            reached = self._train_epoch(self.epoch + 1)
            if not all(self.team.gather(reached)):
                self.commit()
                raise self.run.interrupted(f"in epoch {self.epoch + 1}")
            if self.config.checkpoint_before_merge and self.merge is not None:
                self.commit()
            self._end_epoch(self.epoch + 1, began)
            self.epoch += 1
            self._leave_or_commit()
        self.commit()

    def _someone_trains(self) -> bool:
        """Raises RunError where all participants, of all ranks, have failed."""
        standings = self._standings()
        errors = [f"  {name}: {s['error']}" for name, s in standings.items() if s["status"] == "failed"]
        if len(errors) == len(standings):
            raise RunError("\n".join(["every participant has failed:", *errors]))
        return any(standing["status"] == "active" for standing in standings.values())

    def _standings(self) -> dict[str, dict[str, Any]]:
        """Of the participants of all ranks, in the run's order."""
        return self._gathered({p.name: p.standing.as_dict() for p in self.participants})

    def _gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        return self.team.collect(own, self.names)

    def _leave_or_commit(self) -> None:
        stopping = any(self.team.gather(self.run.stop()))
        if stopping or self._commit_is_due():
            self.commit()
        if stopping and self.epoch < self.num_epochs:
            raise self.run.interrupted(f"after epoch {self.epoch}")

    def _commit_is_due(self) -> bool:
        """After an epoch: also where a number of steps ends with it, which training to its end has left out."""
        every = self.config.checkpoint_every
        if every in ("epoch", "never"):
            return every == "epoch"
        return any(p.trainer.step % int(every) == 0 for p in self._active())

    def commit(self) -> None:
        """Commit a checkpoint of every participant, and the line that makes them one state of the loop. On all
        ranks."""
        self.run.listener.flush()
        before = self.commits()[-1:]
        own: dict[str, Any] = {}
        for participant in self.participants:
            name, standing = participant.name, participant.standing
            if standing.status == "failed":
                folder = before[0]["checkpoints"][name] if before else None
            else:
                folder = participant.store.commit(participant.trainer, merges=standing.num_merges).name
            own[name] = {
                "checkpoint": folder,
                "step": participant.trainer.step,
                "standing": standing.as_dict(),
            }
        found = self._gathered(own)
        content = {
            "loop": self.name,
            "epoch": self.epoch,
            "checkpoints": {name: entry["checkpoint"] for name, entry in found.items()},
            "steps": {name: entry["step"] for name, entry in found.items()},
            "standings": {name: entry["standing"] for name, entry in found.items()},
            "schedule": None if self.schedule is None else self.schedule.state(),
        }
        if before and all(before[0][key] == value for key, value in content.items()):
            return
        self.run.exchange()  # the checkpoints of all ranks are in the journal before the line that names them
        if self.team.is_main:
            self.run.journal.append(COMMIT, **content)
        for participant in self.participants:
            if participant.standing.status != "failed":
                entry = own[participant.name]
                path = str(participant.store.folder / entry["checkpoint"])
                self.run.listener.handle(
                    CheckpointRecord(participant=participant.name, step=entry["step"], path=path)
                )
        self.run.exchange()

    # Training

    def _active(self) -> list[Participant]:
        return [p for p in self.participants if p.is_active]

    def _train_epoch(self, epoch: int) -> bool:
        """Train this rank's participants; False when a stop was asked for."""
        together = self.config.participants_per_step
        active = self._active()
        for first in range(0, len(active), together):
            group = active[first : first + together]
            until = None if len(group) == 1 else 1
            while behind := [p for p in group if p.is_active and p.trainer.step < _end_of(p, epoch)]:
                for participant in behind:
                    if not self._train(participant, epoch, until):
                        return False
        say_task("")
        return True

    def _train(self, participant: Participant, epoch: int, num_steps: int | None) -> bool:
        """Train to the end of the epoch, or ``num_steps``; what fails is this participant's own affair."""
        say_task(participant.name)
        try:
            return self._train_to(participant, _end_of(participant, epoch), num_steps)
        except (Interrupted, CheckpointError):
            raise
        except Exception as error:
            logger.debug("%s failed", participant.name, exc_info=True)
            self._failed(participant, error)
            return True

    def _train_to(self, participant: Participant, end: int, num_steps: int | None) -> bool:
        trainer, config = participant.trainer, self.config
        boundaries = Boundaries(
            end,
            trainer.num_steps_per_epoch,
            eval_every=config.eval_every if participant.has_rows_to_evaluate else "never",
            checkpoint_every=config.checkpoint_every,
        )
        until = end if num_steps is None else min(trainer.step + num_steps, end)
        while trainer.step < until:
            if not trainer.fit(min(boundaries.next_after(trainer.step), until)):
                return False
            if boundaries.evaluate_at(trainer.step):
                self._evaluate(participant, "during")
            if boundaries.checkpoint_at(trainer.step):
                self.commit()
        return True

    def _evaluate(self, participant: Participant, phase: Any) -> None:
        if not participant.has_rows_to_evaluate or self.config.eval_every == "never":
            return
        trainer = participant.trainer
        participant.standing.metrics = self.run.evaluate(trainer, phase, trainer.evaluate)

    def _failed(self, participant: Participant, error: Exception) -> None:
        standing = participant.standing
        text = f"{type(error).__name__}: {error}"
        commits = self.commits()
        can_recover = (
            self._rebuild is not None
            and standing.num_failures < num_recoveries(self.config)
            and bool(commits)
        )
        step = participant.trainer.step
        participant.trainer.close()
        if can_recover:
            assert self._rebuild is not None
            restored = Standing(**commits[-1]["standings"][participant.name])
            restored.num_failures, restored.killings = standing.num_failures + 1, standing.killings
            self._rebuild(participant)
            participant.standing = restored
            participant.trainer.start(self._checkpoint(participant, commits[-1]))
        else:
            standing.status, standing.error = "failed", text
            standing.num_failures += 1
        self._record_failure(participant, step, text, can_recover)

    def _count_killings(self, participant: Participant) -> None:
        """A process that was killed over a participant is a failure of it. It stands at its last checkpoint already."""
        standing = participant.standing
        new = [k for k in killings_of(participant.name) if k.id not in standing.killings]
        if not new or standing.status == "failed":
            return
        standing.killings += [killing.id for killing in new]
        standing.num_failures += len(new)
        goes_on = standing.num_failures <= num_recoveries(self.config)
        if not goes_on:
            standing.status, standing.error = "failed", new[-1].reason
            participant.trainer.close()  # its optimizer too: memory may have been the reason
        self._record_failure(participant, participant.trainer.step, new[-1].reason, goes_on)

    def _record_failure(self, participant: Participant, step: int, text: str, can_recover: bool) -> None:
        outcome = (
            f"goes on from its last checkpoint (step {participant.trainer.step})"
            if can_recover
            else "takes no further part; the others go on"
        )
        self.run.journal.append(
            "participant_failed", participant=participant.name, step=step, error=text, recovered=can_recover
        )
        self.run.listener.handle(
            AlertRecord(
                kind="participant_failed",
                participant=participant.name,
                step=step,
                message=f"{participant.name} failed at step {step} and {outcome}: {text}",
                values={"num_failures": float(participant.standing.num_failures)},
            )
        )

    # After an epoch

    def _end_epoch(self, epoch: int, began: float) -> None:
        own: dict[str, Any] = {}
        for participant in self._active():
            seen = self._observe(participant, epoch)
            self._stop_early(participant, seen)
            own[participant.name] = {"step": participant.trainer.step, "seen": dataclasses.asdict(seen)}
        found = self._gathered(own)
        self.run.exchange()  # what the others did in this epoch is told before what follows from it
        decision = None
        if self.schedule is not None and self.merge is not None:
            self.schedule.observe([Observation(**entry["seen"]) for entry in found.values()])
            standings = self._standings()
            names = [name for name, standing in standings.items() if standing["status"] != "failed"]
            decision = self.schedule.decide(epoch, names)
            if self.team.is_main:
                self.run.journal.append("decision", epoch=epoch, **dataclasses.asdict(decision))
            if decision.should_merge:
                self.schedule.record_merge(epoch, self.merge(epoch, decision))
        standings = self._standings()
        if not self.team.is_main:
            return
        self.run.listener.handle(
            RoundRecord(
                round=epoch,
                epoch=epoch,
                num_epochs=self.num_epochs,
                steps={name: entry["step"] for name, entry in found.items()},
                active=[name for name, s in standings.items() if s["status"] == "active"],
                stopped={n: s["stop_reason"] or "" for n, s in standings.items() if s["status"] == "stopped"},
                failed={n: s["error"] or "" for n, s in standings.items() if s["status"] == "failed"},
                seconds=time.monotonic() - began,
                decision=None if decision is None else dataclasses.asdict(decision),
            )
        )

    def _observe(self, participant: Participant, epoch: int) -> Observation:
        train_loss = participant.end_epoch()
        say_task(participant.name)
        self._evaluate(participant, "during" if epoch < self.num_epochs else "after")
        say_task("")
        metrics = participant.standing.metrics
        return Observation(
            participant=participant.name,
            epoch=epoch,
            train_loss=train_loss,
            metrics=metrics,
            score=score_of(metrics, self.config.metric),
        )

    def _stop_early(self, participant: Participant, seen: Observation) -> None:
        config = self.config
        if not config.early_stopping_patience or seen.score is None:
            return
        rule = EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold)
        if participant.standing.early_stopping:
            rule.load_state(participant.standing.early_stopping)
        if rule.observe(seen.score):
            reason = f"no better for {config.early_stopping_patience} evaluations"
            participant.standing.status, participant.standing.stop_reason = "stopped", reason
            self.run.say("info", f"{participant.name} stops early: {reason}")
        participant.standing.early_stopping = rule.state()


def score_of(metrics: Any, metric: str) -> float | None:
    """The metric that decides, as a number of which more is better; None where nothing was evaluated.

    Args:
        metrics: of an evaluation.
        metric: its name, or ``auto``: accuracy of a classifier, loss of a language model.
    """
    if metric == "auto":
        metric = "accuracy" if "accuracy" in metrics else "loss"
    if metric not in metrics:
        return None
    return -metrics[metric] if metric in ("loss", "perplexity") else metrics[metric]


def _end_of(participant: Participant, epoch: int) -> int:
    return epoch * participant.trainer.num_steps_per_epoch
