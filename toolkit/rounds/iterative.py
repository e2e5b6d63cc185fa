"""Iterative training and merging: locales that are trained side by side and merged while they train.

In this order, each part durable before the next begins: training with merges; the final models; training of every
locale without any merge, for the comparison; the comparison.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from toolkit.data.prepare import Prepared, prepare, shared_label_names
from toolkit.data.read import EVALUATION_SPLITS, open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import LaunchError
from toolkit.evaluation.outcomes import RowOutcomes
from toolkit.launch.plan import LaunchPlan
from toolkit.modeling.adapters import lora_config
from toolkit.modeling.load import load_model_config
from toolkit.modeling.source import find_model, model_fingerprint
from toolkit.reporting import environment
from toolkit.reporting.records import RunStart
from toolkit.rounds.baselines import Baselines
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.rounds.comparison import best_source, compare, comparison_record
from toolkit.rounds.final_model import write_final_model
from toolkit.rounds.loop import COMMIT, RoundLoop
from toolkit.rounds.merge_step import MergeStep
from toolkit.rounds.merging import MergeCoordinator, MergedModels, MergeOutcome
from toolkit.rounds.monitor import build_listeners
from toolkit.rounds.outcome_files import (
    BASE,
    BEST_SOURCE,
    ITERATIVE,
    LAST_MERGE,
    OWN_TRAINING,
    OutcomeFiles,
)
from toolkit.rounds.participants import Participant, TrainerFactory
from toolkit.rounds.run import Run, run_in_directory
from toolkit.rounds.run_directory import RunDirectory
from toolkit.rounds.schedule import build_schedule
from toolkit.rounds.summary import configuration_rows
from toolkit.rounds.team import Team, join_team

RECIPE = "iterative-merge"
LOOP = "training"
TEST_SPLIT = "test"
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
        self.rows: dict[str, Prepared] = {}
        """Prepared rows of every locale, and of target languages that are none of them."""
        self.compared: dict[str, Any] = {}
        """Rows on which the models of each locale are compared: its test split, else its held-out rows."""
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
        label_names = self._prepare_rows(tokenizer)
        self.directory.check_facts(self._facts())
        self.factory = TrainerFactory(self.config, self.plan, tokenizer, label_names, self.processes)
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
            loop.go(before=self._write_base_outcomes)
            self._hand_over(tokenizer)
        if self.config.baselines:
            for participant in self.participants:
                self.factory.discard(participant.trainer)
            self.participants = []
            Baselines(self, self.factory, self.rows, self.compared, self.outcomes).go()
        if self.is_main:
            self._compare()
            self.journal.append("finished")
            self.end("done", summary=self._result_rows(time.monotonic() - began), paths=self._paths())
        self.team.wait()

    # Preparation

    def _prepare_rows(self, tokenizer: Any) -> list[str] | None:
        """Read the rows of all locales; returns the classes of the one classifier."""
        config = self.config
        load_model_config(config)
        locales = dict.fromkeys(
            [*config.locales, *(config.targets if config.merge_scope == "target" else ())]
        )
        own = {locale: config.for_locale(locale) for locale in locales}
        label_names = None
        if config.task == "sequence-classification":
            label_names = shared_label_names([own[locale] for locale in config.locales])
        for is_turn in (
            self.team.is_main,
            not self.team.is_main,
        ):  # the others read what the first put into the cache
            for locale, options in own.items() if is_turn else ():
                keywords = {"seed": config.seed, "label_names": label_names}
                self.rows[locale] = prepare(options, tokenizer, config.task, **keywords)
                test = _with_test_split(options)
                rows = (
                    self.rows[locale] if test is None else prepare(test, tokenizer, config.task, **keywords)
                )
                if rows.evaluation is not None:
                    self.compared[locale] = rows.evaluation
            self.team.wait()
        return label_names

    def _facts(self) -> dict[str, Any]:
        """What the run stands on."""
        config = self.config
        commit = getattr(load_model_config(config), "_commit_hash", None)
        return {
            "data_fingerprint": {locale: rows.fingerprint for locale, rows in self.rows.items()},
            "model_fingerprint": model_fingerprint(find_model(config.model), config.revision, commit),
        }

    def _build_loop(self) -> RoundLoop:
        for locale in self.team.own(self.config.locales):
            self.participants.append(self._participant(locale))
        first = self.participants[0].trainer
        adapter_config = lora_config(first.model, self.config) if self.config.finetuning == "lora" else None
        spread: dict[str, Any] = {"participants": self.config.locales, "group": self.team.group}
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
        step = MergeStep(self, self.participants, names, coordinator, moments, self.rows, write)
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
        participant = Participant(locale, self.rows[locale], None, store)  # pyright: ignore[reportArgumentType] - its trainer needs it for on_step
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
        self.merged_models.recover()

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
        for locale, rows in self.rows.items():
            for problem in rows.report.problems:
                self.say("warning", f"data check of {locale}, skipped as asked: {problem}")
            for warning in rows.report.warnings:
                self.say("warning", f"data check of {locale}: {warning}")
        if commit is not None:
            self.say("info", f"resumed after epoch {commit['epoch']} of {self.config.num_epochs}")

    def _write_base_outcomes(self, participant: Participant) -> None:
        self._write_outcomes(BASE, participant)

    def _write_outcomes(self, arm: str, participant: Participant) -> None:
        name = participant.name
        if name in self.compared:
            self.outcomes.write(arm, name, participant.trainer.evaluate_rows(self.compared[name]))

    def _hand_over(self, tokenizer: Any) -> None:
        """Write what training with merges gave: row outcomes, and the model of every locale."""
        targets = self.config.targets
        for participant in self.participants:
            if participant.standing.status == "failed":
                continue
            self._write_outcomes(ITERATIVE, participant)
            self._write_last_merge(participant)
            folders = [self.directory.path / participant.name]
            if participant.name == targets[0] or participant.name == self.config.locales[0]:
                folders.append(self.directory.path)
            for folder in folders:
                write_final_model(
                    folder,
                    participant.trainer,
                    tokenizer,
                    config=self.config,
                    plan=self.plan,
                    recipe=RECIPE,
                    label_names=self.factory.label_names,
                    rows=[("Locale", participant.name)],
                    processes=self.processes,
                )
        self.exchange()
        if self.is_main:
            self.journal.append(TRAINED)
        self.exchange()

    def _write_last_merge(self, participant: Participant) -> None:
        """What the newest merged model that was made for a participant does, taken over or not."""
        merges = [r for r in self.journal.records("merge") if participant.name in r["gate"]]
        if not merges or participant.name not in self.compared:
            return
        paths: dict[str, str] = merges[-1]["paths"]
        name = paths.get(participant.name) or next(iter(paths.values()))
        own = participant.trainer.state()
        participant.trainer.load_state(saved_state(self.merged_models.folder / name, participant.trainer))
        self._write_outcomes(LAST_MERGE, participant)
        participant.trainer.load_state(own)

    # The comparison

    def _compare(self) -> None:
        metric = self.config.metric
        if metric == "auto":
            metric = "accuracy" if self.config.task == "sequence-classification" else "loss"
        measured: dict[str, dict[str, list[RowOutcomes]]] = {}
        sources: dict[str, str] = {}
        for locale in self.config.locales:
            arms, source = self._arms(locale, metric)
            if arms:
                measured[locale] = arms
            if source is not None:
                sources[locale] = source
        if measured:
            found = compare(
                measured,
                metric=metric,
                num_samples=self.config.bootstrap_samples,
                seed=self.config.seed,
                best_sources=sources,
            )
            self.listener.handle(comparison_record(found))

    def _arms(self, locale: str, metric: Any) -> tuple[dict[str, list[RowOutcomes]], str | None]:
        """What was measured on a locale's rows, and which other locale's model is best there."""
        read = self.outcomes.read
        found = {arm: read(arm, locale) for arm in (BASE, OWN_TRAINING, LAST_MERGE, ITERATIVE)}
        others = {
            other: read(OWN_TRAINING, other, rows_of=locale)
            for other in self.config.locales
            if other != locale
        }
        others = {other: outcomes for other, outcomes in others.items() if outcomes is not None}
        source = best_source(others, metric)
        if source is not None:
            found[BEST_SOURCE] = others[source]
        return {arm: [outcomes] for arm, outcomes in found.items() if outcomes is not None}, source

    def _result_rows(self, seconds: float) -> list[tuple[str, str]]:
        return [("Time of this session", f"{seconds / 60:.1f} min")]

    def _paths(self) -> list[tuple[str, str]]:
        return [("Model saved to", str(self.directory.path / "final_model"))]


def saved_state(folder: Path, trainer: Any) -> dict[str, Any]:
    """The state that was saved as a model folder, complete: what a folder leaves out (a second name of a tied tensor)
    is taken from the name that it is tied to, or from the trainer."""
    saved: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        saved |= load_file(path)
    own = trainer.state()
    if own.keys() <= saved.keys():
        return saved
    places = {name: tensor.data_ptr() for name, tensor in trainer.model.state_dict().items()}
    by_place = {places[name]: tensor for name, tensor in saved.items()}
    return {name: saved.get(name, by_place.get(places[name], tensor)) for name, tensor in own.items()}


def _with_test_split(options: Any) -> Any | None:
    """The options that read the test split as held-out rows, where there is one besides those that training looks at:
    a gate and a schedule choose by those, so they would flatter the result."""
    if options.eval_data is not None or options.eval_split == TEST_SPLIT:
        return None
    splits = open_source(options.data).splits
    if TEST_SPLIT not in splits or not any(
        name in splits for name in EVALUATION_SPLITS if name != TEST_SPLIT
    ):
        return None
    return options.model_copy(update={"eval_split": TEST_SPLIT})
