"""What the runs of all recipes have in common: who listens, how a run is stopped, and how it ends."""

import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate

from toolkit.errors import Interrupted, MeldkitError
from toolkit.launch.plan import LaunchPlan
from toolkit.reporting import listeners, resources
from toolkit.reporting.courier import Courier, unpack
from toolkit.reporting.history import plain
from toolkit.reporting.libraries import speak_into_the_log
from toolkit.reporting.records import EvaluationRecord, MessageRecord, RunEnd, StepRecord
from toolkit.rounds.run_directory import CONFIG_NAME, RunDirectory
from toolkit.rounds.signals import StopRequest
from toolkit.rounds.team import Team
from toolkit.training.contract import ParticipantTrainer, StepStatistics
from toolkit.training.world import close_world, prepare_world

logger = logging.getLogger(__name__)


def run_in_directory(
    kind: "Callable[..., Run]", recipe: str, config: Any, plan: LaunchPlan, team: Team | None = None
) -> int:
    """Enter the plan's world, lock the run directory and run; returns the exit status.

    Args:
        kind: makes the run: a subclass of :class:`Run`.
        team: where the run's participants are spread over ranks, each with a world of its own.

    Raises:
        MeldkitError: of the kinds in ``toolkit.errors``; the run directory then says how far it came.
    """
    prepare_world(plan)
    processes = accelerate.PartialState()
    team = team or Team()
    directory = RunDirectory(
        Path(config.output_dir),
        config.model_dump(mode="json"),
        recipe=recipe,
        resume=config.resume,
        is_main_process=processes.is_main_process and team.is_main,
    )
    try:
        team.wait()
        kind(config, plan, directory, processes, team).run()
        close_world()  # not after an error: other processes may still be in a collective
        return 0
    finally:
        directory.close()


class Run:
    """One run of a recipe in its run directory.

    Args:
        recipe: the recipe's name on the command line.
        config: the recipe's options.
        plan: the launch plan.
        directory: the run directory, locked by the main process.
        processes: accelerate's PartialState: the processes that train one participant together.
        team: the ranks over which participants are spread.

    Attributes:
        is_main: whether this process speaks and writes for all of the run.
    """

    def __init__(
        self,
        recipe: str,
        config: Any,
        plan: LaunchPlan,
        directory: RunDirectory,
        processes: Any,
        team: Team,
    ) -> None:
        self.recipe = recipe
        self.config = config
        self.plan = plan
        self.directory = directory
        self.journal = directory.journal
        self.processes = processes
        self.team = team
        self.is_main = processes.is_main_process and team.is_main
        self.listener: Any = listeners.Listeners()
        self.stop = StopRequest(self._announce_stop)
        self.step = 0
        """Of the participant that is training; said where a run ends early."""

    def run(self) -> None:
        """Do all of it; what is done already is not done again."""
        raise NotImplementedError

    def listen(self, restored_steps: Mapping[str, int] | None) -> Any:
        """Build the listeners. ``restored_steps``: on a resume, participant to restored step."""
        self.listener = self.build_listeners(restored_steps) if self.team.is_main else Courier()
        if self.is_main:
            speak_into_the_log()
        return self.listener

    def exchange(self) -> None:
        """Bring journals and records of all ranks together. On all ranks."""
        if self.team.num_ranks == 1:
            return
        self.journal.exchange(self.team.gather)
        carried = self.team.gather([] if self.team.is_main else self.listener.take())
        if self.team.is_main:
            for record in (record for records in carried for record in records):
                self.listener.handle(unpack(record))

    def build_listeners(self, restored_steps: Mapping[str, int] | None) -> Any:
        return listeners.build(
            self.directory.path,
            self.config,
            is_main_process=self.is_main,
            resumed_history=restored_steps,
        )

    def say(self, level: Any, text: str) -> None:
        self.listener.handle(MessageRecord(level=level, text=text))

    def say_nothing_left(self) -> None:
        with self.listen(None):
            self.say("info", f"the run in {self.directory.path} is complete; nothing is left to do")

    def record_step(self, participant: str, step: StepStatistics, num_steps: int) -> None:
        """Tell the listeners of an optimizer step."""
        self.step = step.step
        if not self.processes.is_main_process:
            return
        sampled = resources.snapshot()
        self.listener.handle(
            StepRecord(
                participant=participant,
                num_steps=num_steps,
                tokens_per_second=step.num_tokens / step.step_seconds,
                memory_bytes=sampled["memory_bytes"],
                gpu=resources.gpu_of_run(sampled["gpus"]),
                **dataclasses.asdict(step),
            )
        )

    def evaluate(
        self, trainer: ParticipantTrainer, phase: Any, evaluate: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """Evaluate and record it; ``evaluate`` gives the metrics."""
        began = time.monotonic()
        metrics = dict(evaluate())
        place = {"participant": trainer.name, "step": trainer.step, "phase": phase}
        self.journal.append("evaluation", **place, metrics=plain(metrics))
        self.listener.handle(
            EvaluationRecord(**place, epoch=trainer.epoch, metrics=metrics, seconds=time.monotonic() - began)
        )
        return metrics

    def interrupted(self, where: str) -> Interrupted:
        """The error with which a run leaves after it was asked to stop and has committed what it did."""
        return Interrupted(
            f"interrupted by {self.stop.received or 'another process'} {where}",
            hint=f"continue with: {self.resume_command()}",
        )

    def end_by(self, error: BaseException) -> None:
        """Record what ended the run. Nothing that fails here may hide ``error``: the disk may be full."""
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        text = error.message if isinstance(error, MeldkitError) else f"{type(error).__name__}: {error}"
        try:
            self.end(status, error=text)
        except Exception:
            logger.warning("the end of the run could not be recorded", exc_info=True)

    def end(
        self,
        status: Any,
        *,
        summary: Sequence[tuple[str, str]] = (),
        paths: Sequence[tuple[str, str]] = (),
        error: str | None = None,
    ) -> None:
        if status != "done" and self.is_main:
            self.journal.append(status, step=self.step, error=error)
        run_dir = self.directory.path
        places = [*paths, ("Run directory", str(run_dir)), ("Report", str(run_dir / "report.html"))]
        self.listener.handle(RunEnd(status=status, summary=list(summary), paths=places, error=error))

    def resume_command(self) -> str:
        config = str(self.directory.path / CONFIG_NAME)
        return shlex.join(["meldkit", "train", self.recipe, "--config", config, "--resume"])

    def _announce_stop(self, name: str) -> None:
        if self.is_main:
            self.say(
                "warning",
                f"{name}: finishing this step and committing a checkpoint; once more leaves at once",
            )
