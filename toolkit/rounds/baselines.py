"""What iterative merging is compared with: every locale trained alone, with the same seed and steps, and no merge."""

import copy
from collections.abc import Mapping
from typing import Any

from toolkit.data.prepare import Prepared
from toolkit.errors import Interrupted, RunError
from toolkit.reporting.records import AlertRecord, EvaluationRecord, MessageRecord
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.rounds.loop import RoundLoop
from toolkit.rounds.outcome_files import OWN_TRAINING, OutcomeFiles
from toolkit.rounds.participants import Participant, TrainerFactory
from toolkit.rounds.run import Run
from toolkit.rounds.team import Team

BASELINE = "baseline"
"""The journal's event for: one locale was trained alone, and what it does on all held-out rows is written."""
FOLDER = "baselines"


class Baselines:
    """Trains the locales alone, one after the other; each is resumed, and done once.

    Args:
        run: of the recipe.
        factory: builds trainers; the adapters of the participants that merged are gone from its base.
        rows: of every locale.
        compared: rows on which the models of each locale are compared.
        outcomes: receives what each model does on the compared rows of every locale.
    """

    def __init__(
        self,
        run: Run,
        factory: TrainerFactory,
        rows: Mapping[str, Prepared],
        compared: Mapping[str, Any],
        outcomes: OutcomeFiles,
    ) -> None:
        self._run = run
        self._factory = factory
        self._rows = rows
        self._compared = compared
        self._outcomes = outcomes
        self._quiet = copy.copy(run)
        self._quiet.team = Team()  # each locale is a matter of one rank

    def go(self) -> None:
        """Train those that are left.

        Raises:
            Interrupted: a stop was asked for; everything is committed.
        """
        run, team = self._run, self._run.team
        done = {record["participant"] for record in run.journal.records(BASELINE)}
        for locale in team.own(sorted(done)):  # a process that was killed may not have come to it
            self._discard_checkpoints(self._store(locale))
        left = [locale for locale in run.config.locales if locale not in done]
        if left and run.is_main:
            run.say("info", f"for the comparison: training {', '.join(left)} without merging")
        mine = team.own(left)
        for turn in range(-(-len(left) // team.num_ranks)):
            stopped = None
            try:
                if turn < len(mine):
                    self._train(mine[turn])
            except Interrupted as error:
                stopped = error
            stops = team.gather(stopped is not None)
            run.exchange()
            if any(stops):
                raise stopped or run.interrupted("during the training without merges")

    def _train(self, locale: str) -> None:
        run = self._run
        self._quiet.listener = _Progress(run.listener, locale)
        name = f"{FOLDER}/{locale}"
        store = self._store(locale)
        trainer = self._factory.build(
            name,
            self._rows[locale],
            store.staging,
            on_step=lambda step: None,
            stop_requested=run.stop,
            seed_name=locale,
            adapter=locale,
        )
        participant = Participant(name, self._rows[locale], trainer, store)
        loop = RoundLoop(self._quiet, [participant], name=name, num_epochs=run.config.num_epochs)
        loop.start(loop.last_intact_commit())
        try:
            self._go(loop, participant)
            for other, rows in self._compared.items() if participant.standing.status != "failed" else ():
                self._outcomes.write(OWN_TRAINING, locale, trainer.evaluate_rows(rows), rows_of=other)
        finally:
            self._factory.discard(trainer, locale)
        run.journal.append(BASELINE, participant=locale, status=participant.standing.status)
        self._discard_checkpoints(store)

    def _go(self, loop: RoundLoop, participant: Participant) -> None:
        try:
            loop.go()
        except RunError:
            if participant.standing.status != "failed":
                raise  # its own failure is an alert, and leaves a gap in the comparison

    def _store(self, locale: str) -> CheckpointStore:
        run = self._run
        return CheckpointStore(
            run.directory.path,
            f"{FOLDER}/{locale}",
            run.journal,
            keep=run.config.keep_checkpoints,
            process_state=run.processes,
        )

    @staticmethod
    def _discard_checkpoints(store: CheckpointStore) -> None:
        store.forget_behind(None)
        store.recover()


class _Progress:
    """Passes on what a person wants to know of a baseline: alerts, and a line for each evaluation."""

    def __init__(self, listener: Any, locale: str) -> None:
        self._listener = listener
        self._locale = locale

    def handle(self, record: Any) -> None:
        if isinstance(record, MessageRecord | AlertRecord):
            self._listener.handle(record)
        elif isinstance(record, EvaluationRecord) and record.phase != "before":
            metric = "accuracy" if "accuracy" in record.metrics else "loss"
            value = record.metrics[metric]
            text = f"{self._locale} without merging, epoch {record.epoch:.3g}: held-out {metric} {value:.4f}"
            self._listener.handle(MessageRecord(level="info", text=text))

    def flush(self) -> None:
        self._listener.flush()
