"""Iterative training and merging: locales that are trained side by side and merged while they train.

In this order, each part durable before the next begins: training with merges; the final models; training of every
locale without any merge, for the comparison; the comparison.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import LaunchError
from toolkit.launch.plan import LaunchPlan
from toolkit.modeling.adapters import lora_config
from toolkit.modeling.load import load_model_config
from toolkit.modeling.source import find_model, model_fingerprint
from toolkit.reporting import environment
from toolkit.reporting.records import RunStart
from toolkit.rounds.adapter_into_base import check_mergeable
from toolkit.rounds.baselines import Baselines
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.rounds.comparison import compare, comparison_record, metric_of
from toolkit.rounds.hand_over import HandOver
from toolkit.rounds.locale_rows import LocaleRows, prepare_locales
from toolkit.rounds.loop import COMMIT, RoundLoop
from toolkit.rounds.merge_step import MergeStep
from toolkit.rounds.merging import MergeCoordinator, MergedModels, MergeOutcome
from toolkit.rounds.monitor import build_listeners
from toolkit.rounds.outcome_files import BASE, OutcomeFiles, arms_of
from toolkit.rounds.participants import Participant, TrainerFactory
from toolkit.rounds.run import Run, run_in_directory
from toolkit.rounds.run_directory import RunDirectory
from toolkit.rounds.schedule import build_schedule
from toolkit.rounds.summary import configuration_rows
from toolkit.rounds.team import Team, join_team

RECIPE = "iterative-merge"
LOOP = "training"
TRAINED = "trained"
"""The journal's event for: training with merges is over, and its models are written."""


def run(config: Any, plan: LaunchPlan) -> int:
    """Train and merge; returns the exit status."""
    if plan.num_processes > len(config.locales):
        raise LaunchError(
            f"{plan.num_processes} processes for {len(config.locales)} locales: some would have nothing to train",
            hint=f"--num-processes {len(config.locales)}",
        )
    if plan.num_processes > 1 and config.checkpoint_every not in ("epoch", "never"):
        raise LaunchError(
            f"--checkpoint-every {config.checkpoint_every}: {plan.num_processes} processes meet after epochs only",
            hint="--checkpoint-every epoch",
        )
    team, own_plan = join_team(plan)
    return run_in_directory(IterativeRun, RECIPE, config, own_plan, team)


class IterativeRun(Run):
    """One run of the recipe."""

    def __init__(
        self, config: Any, plan: LaunchPlan, directory: RunDirectory, processes: Any, team: Team
    ) -> None:
        super().__init__(RECIPE, config, plan, directory, processes, team)
        self.outcomes = OutcomeFiles(directory.path / "comparison")
        self.locales = LocaleRows({}, {}, None)
        self.merged_models = MergedModels(
            directory.path,
            directory.journal,
            keep=config.retain_merge_checkpoints,
        )
        self.factory: Any = None
        self.participants: list[Participant] = []

    def build_listeners(self, restored_steps: Mapping[str, int] | None) -> Any:
        listener, _ = build_listeners(
            self.directory.path,
            self.config,
            is_main_process=self.is_main,
            resumed_history=restored_steps,
        )
        return listener

    def run(self) -> None:
        if self.directory.is_finished:
            self.say_nothing_left()
            return
        tokenizer = load_tokenizer(self.config)
        model_config = load_model_config(
            self.config
        )  # what is wrong with the model is said before rows are read
        if self.config.merge_final:
            check_mergeable(self.config, model_config)
        self.locales = prepare_locales(self.config, tokenizer, self.team)
        self.directory.check_facts(self._facts())
        self.factory = TrainerFactory(
            self.config, self.plan, tokenizer, self.locales.label_names, self.processes
        )
        is_trained = bool(self.journal.records(TRAINED))
        loop = None if is_trained else self._build_loop()
        commit = None if loop is None else loop.last_intact_commit()
        here = environment.describe()
        changed_versions = self.directory.changed_versions(here["versions"])
        self.directory.begin(
            self._facts(), here | {"plan": self.plan.as_dict(), "plan_notes": list(self.plan.notes)}
        )
        self.journal.exchange(self.team.gather)
        self._take_back(commit)
        with self.listen(self._restored(loop, commit)):
            if self.is_main:
                for change in changed_versions:
                    self.say("warning", f"{change} since the run was started: its bits may not be the same")
            try:
                with self.stop:
                    self._go(loop, commit, tokenizer)
            except BaseException as error:
                self.end_by(error)
                raise
            finally:
                for participant in self.participants:
                    participant.trainer.close()

    def _go(self, loop: RoundLoop | None, commit: dict[str, Any] | None, tokenizer: Any) -> None:
        began = time.monotonic()
        if loop is not None:
            loop.start(commit)
            self._announce(commit)
            hand_over = HandOver(self, self.factory, self.outcomes, self.merged_models, self.locales.compared)
            loop.go(before=lambda participant: hand_over.write_outcomes(BASE, participant))
            hand_over.write(self.participants)
            self.exchange()
            if self.is_main:
                self.journal.append(TRAINED)
            self.exchange()
        if self.config.baselines:
            for participant in self.participants:
                self.factory.discard(participant.trainer)
            self.participants = []
            Baselines(self, self.factory, self.locales.rows, self.locales.compared, self.outcomes).go()
        if self.is_main:
            self._compare()
            self.journal.append("finished")
            self.end("done", summary=self._result_rows(time.monotonic() - began), paths=self._paths())
        self.team.wait()

    # Preparation

    def _facts(self) -> dict[str, Any]:
        """What the run stands on."""
        config = self.config
        commit = getattr(load_model_config(config), "_commit_hash", None)
        return {
            "data_fingerprint": {locale: rows.fingerprint for locale, rows in self.locales.rows.items()},
            "model_fingerprint": model_fingerprint(find_model(config.model), config.revision, commit),
        }

    def _build_loop(self) -> RoundLoop:
        for locale in self.team.own(self.config.locales):
            self.participants.append(self._participant(locale))
        first = self.participants[0].trainer
        adapter_config = lora_config(first.model, self.config) if self.config.finetuning == "lora" else None
        spread: dict[str, Any] = {"participants": self.config.locales, "is_spread": self.team.num_ranks > 1}
        coordinator = MergeCoordinator(
            self.config, base=first.state(), adapter_config=adapter_config, seed=self.config.seed, **spread
        )
        mean = self.config.model_copy(update={"merge_algorithm": "linear", "merge_parameters": {}})
        moments = MergeCoordinator(mean, **spread)

        def write(trainer: Any, outcome: MergeOutcome, targets: Sequence[str], epoch: int) -> Path:
            return self.merged_models.add(
                outcome.state,
                round_number=epoch,
                participants=targets if self.config.merge_scope == "each" else list(outcome.weights),
                model=trainer.model,
                adapter_config=adapter_config,
                tokenizer=self.factory.tokenizer,
                record={
                    "epoch": epoch,
                    "targets": list(targets),
                    "weights": outcome.weights,
                    "method": outcome.method,
                    "seconds": outcome.seconds,
                    "attempts": outcome.attempts,
                    "input_sha256": outcome.input_sha256,
                    "output_sha256": outcome.output_sha256,
                    "integrity": outcome.integrity,
                    "notes": outcome.notes,
                },
            )

        names = self.config.locales
        step = MergeStep(self, self.participants, names, coordinator, moments, self.locales.rows, write)
        return RoundLoop(
            self,
            self.participants,
            names=names,
            name=LOOP,
            num_epochs=self.config.num_epochs,
            schedule=build_schedule(self.config),
            merge=step,
            rebuild=self._rebuild,
        )

    def _participant(self, locale: str) -> Participant:
        store = CheckpointStore(
            self.directory.path,
            locale,
            self.journal,
            keep=self.config.keep_checkpoints,
            process_state=self.processes,
        )
        participant = Participant(locale, self.locales.rows[locale], None, store)  # pyright: ignore[reportArgumentType] - its trainer needs it for on_step
        self._build_trainer(participant)
        return participant

    def _build_trainer(self, participant: Participant) -> None:
        def on_step(step: Any) -> None:
            participant.count_step(step)
            self.record_step(participant.name, step, participant.trainer.num_steps)

        participant.trainer = self.factory.build(
            participant.name,
            participant.prepared,
            participant.store.staging,
            on_step=on_step,
            stop_requested=self.stop,
        )

    def _rebuild(self, participant: Participant) -> None:
        self.factory.discard(participant.trainer)
        self._build_trainer(participant)

    # Resuming

    def _take_back(self, commit: dict[str, Any] | None) -> None:
        """Take back what the journal holds after the last commit, of whichever part of the run."""
        durable = [r["number"] for r in self.journal.records() if r["event"] in (TRAINED, COMMIT, "baseline")]
        if commit is not None:
            durable = [commit["number"]]
        self.journal.rewind(durable[-1] if durable else 0)
        if self.is_main:
            self.merged_models.recover()
        self.team.wait()

    def _restored(self, loop: RoundLoop | None, commit: dict[str, Any] | None) -> dict[str, int] | None:
        if not self.config.resume:
            return None
        if loop is None:
            commit = [r for r in self.journal.records(COMMIT) if r["loop"] == LOOP][-1]
            return dict(commit["steps"])
        return loop.steps_of(commit)

    # Around the loop

    def _announce(self, commit: dict[str, Any] | None) -> None:
        steps = self.team.gather(max(p.trainer.num_steps for p in self.participants))
        if self.is_main:
            self.listener.handle(self._run_start(max(steps)))
            self._say_notes(commit)

    def _run_start(self, num_steps: int) -> RunStart:
        first = self.participants[0]
        return RunStart(
            recipe=RECIPE,
            title=self.config.run_name or self.directory.path.name,
            rows=[
                ("Locales", ", ".join(self.config.locales)),
                *self._merge_rows(),
                *configuration_rows(self.config, self.plan, first.prepared, first.trainer),
            ],
            num_steps=num_steps,
            participants=self.config.locales,
            num_epochs=self.config.num_epochs,
            data_check=first.prepared.report.as_dict(),
        )

    def _merge_rows(self) -> list[tuple[str, str]]:
        config = self.config
        every = f"every {config.merge_frequency} epochs" if config.merge_frequency > 1 else "every epoch"
        if config.adaptive_merge_frequency:
            every += f", adaptive between {config.min_merge_frequency} and {config.max_merge_frequency}"
        scope = "a mixture for each locale"
        if config.merge_scope == "target":
            scope = f"one model for {', '.join(config.targets)}"
        return [
            ("Merge", f"{config.merge_algorithm}, {every}, {scope}"),
            ("Weights", config.weighting),
        ]

    def _say_notes(self, commit: dict[str, Any] | None) -> None:
        for note in self.plan.notes:
            self.say("debug", note)
        for note in self.participants[0].trainer.throughput_notes:
            self.say("info", f"throughput: {note}")
        for note in self.participants[0].trainer.notes:
            self.say("warning", note)
        for locale, rows in self.locales.rows.items():
            for problem in rows.report.problems:
                self.say("warning", f"data check of {locale}, skipped as asked: {problem}")
            for warning in rows.report.warnings:
                self.say("warning", f"data check of {locale}: {warning}")
        if commit is not None:
            self.say("info", f"resumed after epoch {commit['epoch']} of {self.config.num_epochs}")

    # The comparison

    def _compare(self) -> None:
        metric = metric_of(self.config.metric, self.config.task)
        measured, sources = arms_of(self.outcomes, self.config.locales, metric)
        if measured:
            found = compare(
                measured,
                metric=metric,
                num_samples=self.config.bootstrap_samples,
                seed=self.config.seed,
                best_sources=sources,
            )
            self.listener.handle(comparison_record(found))

    def _result_rows(self, seconds: float) -> list[tuple[str, str]]:
        merges = self.journal.records("merge")
        verdicts = [verdict for merge in merges for verdict in merge["gate"].values()]
        made = sum(merge["status"] == "merged" for merge in merges)
        rows = [("Merges", str(made) if made == len(merges) else f"{made} of {len(merges)} attempted")]
        if self.config.merge_gate:
            rows.append(
                ("Taken over", f"{verdicts.count('accepted')} of {len(verdicts)} merged states offered")
            )
        standings = [r for r in self.journal.records(COMMIT) if r["loop"] == LOOP][-1]["standings"]
        for locale, standing in standings.items():
            if standing["status"] == "failed":
                rows.append((f"{locale} failed", standing["error"]))
            elif standing["status"] == "stopped":
                rows.append((f"{locale} stopped early", standing["stop_reason"]))
        return [*rows, ("Time of this session", f"{seconds / 60:.1f} min")]

    def _paths(self) -> list[tuple[str, str]]:
        run_dir = self.directory.path
        models = (
            [("Model saved to", str(run_dir / "final_model"))] if (run_dir / "final_model").is_dir() else []
        )
        return [*models, ("Model of each locale", str(run_dir / "LOCALE" / "final_model"))]
