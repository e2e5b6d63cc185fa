"""Centralized training: the loop of all recipes with one participant and no merge."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import broadcast_object_list

from toolkit.data.collate import Collator
from toolkit.data.prepare import Prepared, prepare
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import LaunchError
from toolkit.evaluation.answers import answer
from toolkit.launch.plan import LaunchPlan
from toolkit.modeling.load import load_model_config
from toolkit.modeling.source import find_model, model_fingerprint
from toolkit.reporting import environment
from toolkit.reporting.records import CheckpointRecord, RunStart, SampleRecord
from toolkit.rounds.adapter_into_base import check_mergeable
from toolkit.rounds.boundaries import Boundaries
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.rounds.final_model import write_final_model
from toolkit.rounds.run import Run, run_in_directory
from toolkit.rounds.run_directory import RunDirectory
from toolkit.rounds.summary import configuration_rows, result_rows
from toolkit.rounds.team import Team
from toolkit.training.arguments import build_arguments
from toolkit.training.contract import ParticipantTrainer, StepStatistics, TrainerSetup, find_backend
from toolkit.training.world import assert_world, training_arguments

PARTICIPANT = "model"


def run(
    config: Any, plan: LaunchPlan, on_trainer: Callable[[ParticipantTrainer], None] = lambda trainer: None
) -> int:
    """Train one model on all the data; returns the exit status.

    Args:
        on_trainer: called with the trainer before it starts, to measure or watch it.
    """
    kind = functools.partial(CentralizedRun, on_trainer=on_trainer)
    return run_in_directory(kind, _recipe_of(config), config, plan)


def _recipe_of(config: Any) -> str:
    """The recipe that runs, which --backend may make another than the one that was named."""
    return f"centralized-{config.backend}"


class CentralizedRun(Run):
    """One run: prepares data and model, drives the trainer from boundary to boundary, writes what comes out."""

    def __init__(
        self,
        config: Any,
        plan: LaunchPlan,
        directory: RunDirectory,
        processes: Any,
        team: Team,
        on_trainer: Callable[[ParticipantTrainer], None],
    ) -> None:
        super().__init__(_recipe_of(config), config, plan, directory, processes, team)
        self.store = CheckpointStore(
            directory.path,
            PARTICIPANT,
            directory.journal,
            keep=config.keep_checkpoints,
            process_state=processes,
        )
        self.trainer: Any = None
        self.num_held_out = 0
        self.on_trainer = on_trainer

    def run(self) -> None:
        if self.directory.is_finished:
            self.say_nothing_left()
            return
        if self.config.merge_final and self.plan.zero_stage == 3:
            raise LaunchError(
                "--merge-final needs the whole model in one process, which ZeRO-3 does not have",
                hint="train without it, or with --deepspeed zero2",
            )
        tokenizer, prepared, facts = self._prepare_data()
        self.directory.check_facts(facts)
        checkpoint = self._find_checkpoint()
        self.num_held_out = 0 if prepared.evaluation is None else len(prepared.evaluation)
        self.trainer = self._build_trainer(tokenizer, prepared)
        self.on_trainer(self.trainer)
        here = environment.describe()
        changed_versions = self.directory.changed_versions(here["versions"])
        self.directory.begin(facts, here | {"plan": self.plan.as_dict(), "plan_notes": list(self.plan.notes)})
        restored = {PARTICIPANT: _step_of(checkpoint)} if self.config.resume else None
        with self.listen(restored), contextlib.closing(self.trainer):
            for change in changed_versions:
                self.say("warning", f"{change} since the run was started: its bits may not be the same")
            try:
                self._train(tokenizer, prepared, checkpoint)
            except BaseException as error:
                self.end_by(error)
                raise

    # Preparation

    def _prepare_data(self) -> tuple[Any, Prepared, dict[str, Any]]:
        """Tokenizer, prepared rows, and the facts on which the run stands."""
        config = self.config
        model_config = load_model_config(config)
        tokenizer = load_tokenizer(config)
        if config.merge_final:
            check_mergeable(config, model_config)
        with self.processes.main_process_first():  # the others read what the first one has put into the cache
            prepared = prepare(config, tokenizer, config.task, seed=config.seed)
        commit = getattr(model_config, "_commit_hash", None)
        facts = {
            "data_fingerprint": prepared.fingerprint,
            "model_fingerprint": model_fingerprint(find_model(config.model), config.revision, commit),
            "num_processes": self.processes.num_processes,
        }
        return tokenizer, prepared, facts

    def _find_checkpoint(self) -> Path | None:
        found: list[Any] = [None]
        if self.processes.is_main_process:
            self.store.recover()
            found = [self.store.latest()]
        if self.processes.num_processes > 1:
            broadcast_object_list(found)
        self.store.forget_after(_step_of(found[0]))
        return found[0]

    def _build_trainer(self, tokenizer: Any, prepared: Prepared) -> ParticipantTrainer:
        config = self.config
        world = training_arguments(self.plan, config)
        # Under ZeRO-3 the model is sharded while it is loaded, if these arguments exist by then.
        sharding = None
        if self.plan.zero_stage == 3:
            sharding = build_arguments(config, world, self.store.staging, seed=config.seed)
        transformers.set_seed(config.seed)
        backend = find_backend(config.backend)
        model = backend.load_base(
            config,
            self.plan,
            label_names=prepared.label_names,
            pad_token_id=tokenizer.pad_token_id,
            local_rank=self.processes.local_process_index,
        )
        is_lora = config.finetuning == "lora"
        if is_lora:
            model = backend.add_adapter(model, config, autocast_dtype=self.plan.zero_stage != 3)
        del sharding
        setup = TrainerSetup(
            name=PARTICIPANT,
            model=model,
            adapter="default" if is_lora else None,
            tokenizer=tokenizer,
            train=prepared.train,
            evaluation=prepared.evaluation,
            collator=Collator(
                tokenizer.pad_token_id,
                config.task,
                packing=config.packing,
                flatten=config.packing and config.attn_implementation.startswith("flash"),
            ),
            config=config,
            seed=config.seed,
            world=world,
            staging=self.store.staging,
            on_step=self._on_step,
            stop_requested=self.stop,
        )
        trainer = backend.build_trainer(setup)
        assert_world(self.plan, trainer.accelerator)
        return trainer

    # The loop

    def _train(self, tokenizer: Any, prepared: Prepared, checkpoint: Path | None) -> None:
        config, trainer, began = self.config, self.trainer, time.monotonic()
        trainer.start(checkpoint)
        self.step = trainer.step
        self.listener.handle(self._run_start(prepared, trainer))
        for note in self.plan.notes:
            self.say("debug", note)
        for note in trainer.notes:
            self.say("warning", note)
        for note in trainer.throughput_notes:
            self.say("info", f"throughput: {note}")
        report = prepared.report
        for problem in report.problems:
            self.say("warning", f"data check, skipped as asked: {problem}")
        for warning in report.warnings:
            self.say("warning", f"data check: {warning}")
        for note in report.notes:
            self.say("info", f"data: {note}")
        if checkpoint is not None:
            self.say("info", f"resumed after step {trainer.step} of {trainer.num_steps}")
        boundaries = Boundaries(
            trainer.num_steps,
            trainer.num_steps_per_epoch,
            eval_every=config.eval_every if prepared.evaluation is not None else "never",
            checkpoint_every=config.checkpoint_every,
        )
        if trainer.step == 0:
            self._answer_samples(tokenizer, "before")
            self._evaluate("before")
        with self.stop:
            while trainer.step < trainer.num_steps:
                self._go_to(boundaries)
            self._commit()
            self._evaluate("after")
        self._answer_samples(tokenizer, "after")
        self._hand_over(tokenizer, prepared, time.monotonic() - began)

    def _go_to(self, boundaries: Boundaries) -> None:
        """Train to the next boundary and do what is due there; leave where a stop was asked for."""
        trainer = self.trainer
        reached = trainer.fit(boundaries.next_after(trainer.step))
        if reached and boundaries.evaluate_at(trainer.step):
            self._evaluate("during")
        if not reached or boundaries.checkpoint_at(trainer.step):
            self._commit()
        if not reached:
            raise self.interrupted(f"after step {trainer.step}")

    def _on_step(self, step: StepStatistics) -> None:
        self.record_step(PARTICIPANT, step, self.trainer.num_steps)

    def _evaluate(self, phase: Any) -> None:
        if self.num_held_out == 0:
            return
        self.say("debug", f"evaluating {self.num_held_out} held-out rows")
        self.evaluate(self.trainer, phase, self.trainer.evaluate)

    def _commit(self) -> None:
        self.listener.flush()
        folder = self.store.commit(self.trainer)
        self.listener.handle(
            CheckpointRecord(participant=PARTICIPANT, step=self.trainer.step, path=str(folder))
        )

    def _answer_samples(self, tokenizer: Any, phase: Any) -> None:
        config = self.config
        if not config.sample_prompts or config.task != "causal-lm" or not self.processes.is_main_process:
            return
        if self.plan.zero_stage == 3:
            self.say(
                "warning",
                "sample prompts are not answered under ZeRO-3, where no process has the whole model",
            )
            return
        for prompt in config.sample_prompts:
            with self.trainer.active():
                text = answer(
                    self.trainer.model,
                    tokenizer,
                    prompt,
                    system_prompt=config.sample_system_prompt,
                    num_tokens=config.sample_tokens,
                    device=self.trainer.accelerator.device,
                )
            self.directory.journal.append("sample", phase=phase, prompt=prompt, answer=text)
            self.listener.handle(
                SampleRecord(participant=PARTICIPANT, phase=phase, prompt=prompt, answer=text)
            )

    # The end

    def _hand_over(self, tokenizer: Any, prepared: Prepared, seconds: float) -> None:
        """Write final_model/ and close the journal."""
        rows = result_rows(self.directory.journal, self.trainer, seconds)
        final = write_final_model(
            self.directory.path,
            self.trainer,
            tokenizer,
            config=self.config,
            plan=self.plan,
            recipe=self.recipe,
            label_names=prepared.label_names,
            rows=rows,
            processes=self.processes,
        )
        self.directory.journal.append("finished", step=self.trainer.step)
        self.end("done", summary=rows, paths=[("Model saved to", str(final))])

    def _run_start(self, prepared: Prepared, trainer: Any) -> RunStart:
        return RunStart(
            recipe=self.recipe,
            title=self.config.run_name or self.directory.path.name,
            rows=configuration_rows(self.config, self.plan, prepared, trainer),
            num_steps=trainer.num_steps,
            participants=[PARTICIPANT],
            num_epochs=trainer.num_steps / trainer.num_steps_per_epoch,
            data_check=prepared.report.as_dict(),
        )


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
