"""Trackers besides the run's own files: TensorBoard, Weights & Biases, trackio.

A tracker is a listener of its own, so that one that fails is warned about and left out, and the run goes on.
"""

import importlib
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.dependencies import is_installed
from toolkit.errors import MissingDependencyError
from toolkit.reporting.records import EvaluationRecord, MergeRecord, Record, RunEnd, RunStart, StepRecord
from toolkit.reporting.wording import is_metric

if TYPE_CHECKING:
    from toolkit.reporting.listeners import Listener, ReportingConfig

FLUSH_SECONDS = 2.0


def missing_trackers(config: "ReportingConfig") -> list[MissingDependencyError]:
    """An error for each tracker that is asked for and not installed; nothing is imported for it."""
    return [
        MissingDependencyError(
            name, purpose=f"--report-to {name}", extra="report" if name != "tensorboard" else None
        )
        for name in dict.fromkeys(config.report_to)
        if not is_installed(name)
    ]


def build_trackers(
    run_dir: Path, config: "ReportingConfig", *, restored_steps: Mapping[str, int] | None = None
) -> "list[Listener]":
    """The trackers that the configuration asks for; look with :func:`missing_trackers` first."""
    trackers: list[Listener] = []
    for name in dict.fromkeys(config.report_to):
        if name == "tensorboard":
            trackers.append(TensorBoard(run_dir, restored_steps))
        else:
            values = config.model_dump(mode="json")
            run_name = config.run_name or run_dir.resolve().name
            trackers.append(RunTracker(name, config.project, run_name, values, run_dir, restored_steps))
    return trackers


def scalars(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """What a tracker shows of a record: tag to value. A value that is not a number is left out."""
    if isinstance(record, EvaluationRecord):
        return {f"eval/{name.removeprefix('eval_')}": value for name, value in record.metrics.items()}
    values: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "train/total_tokens": record.total_tokens,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/step_seconds": record.step_seconds,
        "memory/peak_bytes": record.memory_bytes,
    }
    values |= {f"gpu/{name}": value for name, value in (record.gpu or {}).items()}
    return {tag: value for tag, value in values.items() if value is not None}


def merge_scalars(record: MergeRecord) -> dict[str, dict[str, float]]:
    """What a tracker shows of a merge: participant to tag to value. Nothing of a merge that was not made."""
    if record.status != "merged":
        return {}
    shared = next(iter(record.weights.values())) if len(record.weights) == 1 else {}
    values: dict[str, dict[str, float]] = {}
    for name, verdict in record.gate.items():
        values[name] = {
            "merge/epoch": record.epoch,
            "merge/seconds": record.seconds,
            "merge/attempts": record.attempts,
            "merge/num_participants": len(record.participants),
            "merge/is_accepted": float(verdict != "rejected"),
        }
        weights = record.weights.get(name, shared)
        values[name] |= {f"merge_weight/{source}": weight for source, weight in weights.items()}
        for when, metrics in (("before", record.before), ("after", record.after)):
            for metric, value in metrics.get(name, {}).items():
                if is_metric(metric):
                    values[name][f"merge/{metric.removeprefix('eval_')}_{when}"] = value
    return values


class TensorBoard:
    """Event files in ``<run_dir>/<participant>/logs``, written with TensorBoard's own record writer.

    No thread and no TensorFlow: the records are appended to an ordinary file. After a resume the new file
    begins with TensorBoard's mark "the steps from here on are made again", so that no step is shown twice.
    """

    def __init__(self, run_dir: Path, restored_steps: Mapping[str, int] | None) -> None:
        self._run_dir = run_dir
        self._restored_steps = restored_steps
        self._files: dict[str, _EventFile] = {}

    def handle(self, record: Record) -> None:
        if isinstance(record, StepRecord | EvaluationRecord):
            file = self._file(record.participant)
            if isinstance(record, StepRecord):
                file.expect_after(record.step)
            file.add(record.step, scalars(record))
        elif isinstance(record, MergeRecord):
            for name, values in merge_scalars(record).items():
                self._file(name).add(record.steps[name], values)
        elif isinstance(record, RunEnd):
            self.flush()

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, participant: str) -> "_EventFile":
        if participant not in self._files:
            purge_step = None
            if self._restored_steps is not None:
                purge_step = self._restored_steps.get(participant, 0) + 1
            self._files[participant] = _EventFile(self._run_dir / participant / "logs", purge_step)
        return self._files[participant]


class _EventFile:
    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Generated modules, whose classes a type checker does not see.
        self._proto: Any = event_pb2
        self._summary_proto: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names; nanoseconds keep two runs of one second apart.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{socket.gethostname()}"
        self._stream = open(folder / name, "xb")  # noqa: SIM115 - closed in close()
        self._writer = RecordWriter(self._stream)
        self._flushed_at = time.monotonic()
        self._write(file_version="brain.Event:2")
        self._last_step = 0
        if purge_step is not None:
            self._purge_from(purge_step)
        self.flush()

    def expect_after(self, step: int) -> None:
        """Say that a participant was set back, where ``step`` is not beyond the one before."""
        if step <= self._last_step:
            self._purge_from(step)
        self._last_step = step

    def _purge_from(self, step: int) -> None:
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=step, session_log=start)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary_proto.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._write(step=step, summary=summary)
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def _write(self, **fields: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._stream.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class RunTracker:
    """W&B or trackio: modules of one interface (init, log, finish).

    Several participants share one tracker run; their scalars are told apart by a prefix. The step is a
    metric of its own (``train/step``), because participants are at different steps at the same time and a
    resumed run goes back.

    Args:
        module_name: ``wandb`` or ``trackio``; imported when the run starts.
        values: the configuration as the tracker shows it.
        restored_steps: on a resume, participant to restored step; the tracker's run of that name is
            continued.
    """

    def __init__(
        self,
        module_name: str,
        project: str,
        run_name: str,
        values: Mapping[str, Any],
        run_dir: Path,
        restored_steps: Mapping[str, int] | None,
    ) -> None:
        self._module_name = module_name
        self._project = project
        self._run_name = run_name
        self._values = dict(values)
        self._run_dir = run_dir
        self._restored_steps = restored_steps
        self._run: Any = None
        self._is_alone = True
        self._status = "failed"

    def handle(self, record: Record) -> None:
        if isinstance(record, RunStart):
            self._is_alone = len(record.participants) <= 1
            self._begin(record)
        elif isinstance(record, StepRecord | EvaluationRecord) and self._run is not None:
            prefix = "" if self._is_alone else f"{record.participant}/"
            values = {
                f"{prefix}{tag}": value for tag, value in scalars(record).items() if math.isfinite(value)
            }
            self._run.log({**values, f"{prefix}train/step": record.step})
        elif isinstance(record, MergeRecord) and self._run is not None:
            self._log_merge(record)
        elif isinstance(record, RunEnd):
            self._status = record.status

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        if self._module_name == "wandb":
            run.finish(exit_code=0 if self._status == "done" else 1)
        else:
            run.finish()

    def _log_merge(self, record: MergeRecord) -> None:
        for name, values in merge_scalars(record).items():
            prefix = "" if self._is_alone else f"{name}/"
            finite = {f"{prefix}{tag}": value for tag, value in values.items() if math.isfinite(value)}
            self._run.log({**finite, f"{prefix}train/step": record.steps[name]})

    def _begin(self, record: RunStart) -> None:
        module = importlib.import_module(self._module_name)
        options: dict[str, Any] = {"project": self._project, "name": self._run_name, "config": self._values}
        if self._module_name == "wandb":
            identity = self._identity()
            options |= {"dir": str(self._run_dir), "id": identity, "resume": "allow", "group": record.recipe}
        else:
            options["resume"] = "never" if self._restored_steps is None else "allow"
        self._run = module.init(**options)
        if self._module_name == "wandb":
            for name in [""] if self._is_alone else [f"{p}/" for p in record.participants]:
                self._run.define_metric(f"{name}train/step", hidden=True)
                for group in ("train", "eval", "speed", "memory", "gpu", "merge", "merge_weight"):
                    self._run.define_metric(f"{name}{group}/*", step_metric=f"{name}train/step")

    def _identity(self) -> str:
        """The W&B id of this run directory: kept in it, so that a resumed run continues the same W&B run."""
        path = self._run_dir / ".wandb_run_id"
        if self._restored_steps is not None and path.exists():
            return path.read_text(encoding="utf-8").strip()
        import uuid

        identity = uuid.uuid4().hex[:12]
        path.write_text(identity + "\n", encoding="utf-8")
        return identity
