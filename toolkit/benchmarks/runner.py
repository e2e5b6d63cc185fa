"""Runs the trials of a benchmark: in turn, each in a process of its own, and keeps what it has when it is stopped."""

import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.benchmarks.arms import Arm
from toolkit.benchmarks.gates import OK, status_alone
from toolkit.benchmarks.process import FELL_BACK, OUT_OF_MEMORY, Ended, environment, run_process
from toolkit.config.bench_command import BenchTrainConfig, MeasurementOptions
from toolkit.durable import write_json
from toolkit.errors import InputError, RunError

TRIAL_SCHEMA = 1
BASE_MODULE = "toolkit.trials"
KILLED = -9


@dataclass(frozen=True)
class Place:
    """A trial in the benchmark: ``number`` from 1 in the order in which they run."""

    number: int
    repeat: int
    arm: Arm

    @property
    def stem(self) -> str:
        return f"{self.repeat:02d}-{self.arm.name}"


def order(arms: Sequence[Arm], repeats: int, seed: int) -> list[Place]:
    """A B, B A, A B, ...: every other repeat runs backwards, so that a drift of the machine's speed cancels out."""
    first = list(arms)
    random.Random(seed).shuffle(first)
    turns = [
        (repeat, arm) for repeat in range(repeats) for arm in (first if repeat % 2 == 0 else first[::-1])
    ]
    return [Place(number, repeat, arm) for number, (repeat, arm) in enumerate(turns, 1)]


class Runner:
    """The trials of one benchmark.

    Args:
        config: the command's options.
        arms: what is compared; the first one is the reference.
        say: told what happens, a line each.
        watch: told ten times a second, while a process runs, what it does.
    """

    def __init__(
        self,
        config: BenchTrainConfig,
        arms: Sequence[Arm],
        *,
        say: Callable[[str], None],
        watch: Callable[[str], None],
    ) -> None:
        self.config = config
        self.arms = arms
        self.out = config.out.absolute()
        self.num_processes = config.num_processes or 1
        self.settings = _settings_of(config)
        self.workload: dict[str, Any] = {}
        self._say, self._watch = say, watch

    def prepare(self) -> None:
        """Check the output folder, write the rows and describe them.

        Raises:
            InputError: another benchmark is in the folder, or the workload is wrong.
        """
        spec = {"settings": self.settings, "folder": str(self.out / "workload")}
        kept = self.out / "workload" / "spec.json"
        if kept.exists():
            if not self.config.resume:
                raise InputError(
                    f"{self.out} holds a benchmark", hint="--resume goes on with it; or another --out"
                )
            if json.loads(kept.read_text(encoding="utf-8")) != json.loads(json.dumps(spec)):
                raise InputError(
                    f"{self.out} holds a benchmark of another workload", hint="give another --out"
                )
        facts = self.out / "workload" / "workload.json"
        if not facts.exists():
            write_json(kept, spec)
            self._say("Preparing the rows")
            self._prepare(kept)
        self.workload = json.loads(facts.read_text(encoding="utf-8"))

    def _prepare(self, spec: Path) -> None:
        with tempfile.TemporaryDirectory() as own:
            ended = run_process(
                [sys.executable, "-m", f"{BASE_MODULE}.prepare", str(spec)],
                spec.with_suffix(".log"),
                environment(Path(own), {}),
                timeout_seconds=60 * self.config.trial_minutes,
                on_poll=lambda seconds: self._watch(f"{seconds:.0f} s"),
            )
        if ended.exit_status != 0:
            said = spec.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
            spec.unlink()
            lines = [
                line for line in said.splitlines() if line.startswith(("error", "  "))
            ] or said.splitlines()
            text = "\n".join(lines[-6:]).removeprefix("error: ")
            raise (InputError if ended.exit_status == 2 else RunError)(
                f"the workload cannot be prepared: {text}"
            )

    def run(self) -> list[dict[str, Any]]:
        """All trials, those of a resumed benchmark that are there already included."""
        places = order(self.arms, self.config.repeats, self.config.order_seed)
        trials = []
        for place in places:
            path = self.out / "trials" / f"{place.stem}.json"
            spec = self._spec(place)
            trial = self._kept(path, spec)
            if trial is None:
                self._say(f"Trial {place.number} of {len(places)}: {place.arm.name}")
                trial = self._run(place, spec)
                write_json(path, trial)
                self._say(f"  {_outcome(trial)}")
            trials.append(trial)
        return trials

    def _spec(self, place: Place) -> dict[str, Any]:
        workload = self.out / "workload"
        held_out = workload / "held_out.jsonl"
        settings = self.settings | {
            "data": str(workload / "rows.jsonl"),
            "eval_data": None,
            "eval_fraction": 0.0,
            "max_rows": None,
            "data_mapping": self.settings["data_mapping"],
            "train_split": "train",
            "eval_split": None,
            "locale": None,
        }
        return {
            "schema": TRIAL_SCHEMA,
            "arm": place.arm.as_dict(),
            "settings": settings,
            "mean_row_tokens": self.workload["mean_row_tokens"],
            "probe_rows": str(workload / "probe_rows.json"),
            "has_held_out": held_out.exists(),
            "num_processes": self.num_processes,
            "warmup_steps": self.config.warmup_steps,
        }

    def _kept(self, path: Path, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """The trial that an interrupted benchmark has finished, if it was the same one."""
        if not path.exists():
            return None
        trial = json.loads(path.read_text(encoding="utf-8"))
        return trial if trial["spec_sha256"] == _sha256(spec) else None

    def _run(self, place: Place, spec: Mapping[str, Any]) -> dict[str, Any]:
        log = self.out / "trials" / f"{place.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="meldkit-bench-") as own:
            folder = Path(own)
            result, error = folder / "result.json", folder / "error.json"
            here = {"folder": own, "result": str(result), "error": str(error)}
            write_json(folder / "spec.json", {**spec, **here})
            ended = run_process(
                self._command(place.arm, folder / "spec.json"),
                log,
                environment(folder, place.arm.environment),
                timeout_seconds=60 * self.config.trial_minutes,
                on_poll=lambda seconds: self._watch(f"{place.arm.name}, {seconds:.0f} s"),
            )
            measured = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
            said = json.loads(error.read_text(encoding="utf-8")) if error.exists() else None
            shutil.rmtree(folder / "run", ignore_errors=True)
        status, reason = self._status(place.arm, ended, measured, said)
        return {
            "schema": TRIAL_SCHEMA,
            "spec_sha256": _sha256(spec),
            "arm": place.arm.name,
            "repeat": place.repeat,
            "number": place.number,
            "status": status,
            "reason": reason,
            "exit_status": ended.exit_status,
            "process_seconds": ended.seconds,
            "peak_tree_rss_bytes": ended.peak_tree_rss_bytes,
            "load_average_before": ended.load_average,
            **(measured or {"steps": [], "losses": [], "rows": None, "facts": None}),
        }

    def _command(self, arm: Arm, spec: Path) -> list[str]:
        module = ["-m", f"{BASE_MODULE}.trial", str(spec)]
        if self.num_processes == 1:
            return [arm.python, *module]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.num_processes}"]
        return [arm.python, *launcher, *module]

    def _status(self, arm: Arm, ended: Ended, measured: Any, said: Any) -> tuple[str, str]:
        if ended.timed_out:
            return "timeout", f"ended after {ended.seconds / 60:.0f} minutes"
        why = f"{said['type']}: {said['message']}" if said else f"exit status {ended.exit_status}"
        if ended.exit_status == FELL_BACK:
            return "fell_back", why
        if ended.exit_status in (OUT_OF_MEMORY, KILLED):
            return "oom", why if said else "killed by the system, as it does when memory runs out"
        if ended.exit_status != 0 or measured is None:
            return "error", why if ended.exit_status else "it wrote no result"
        return status_alone(
            arm, measured, num_processes=self.num_processes, warmup_steps=self.config.warmup_steps
        )


def _settings_of(config: BenchTrainConfig) -> dict[str, Any]:
    """The workload's options as JSON values: those of training, not those of the measurement."""
    hidden = {*MeasurementOptions.model_fields, *config.unavailable}
    return json.loads(config.model_dump_json(exclude=hidden))


def _sha256(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _outcome(trial: Mapping[str, Any]) -> str:
    if trial["status"] != OK:
        return f"{trial['status']}: {trial['reason']}"
    steps = len(trial["steps"])
    return f"{steps} steps in {sum(step['seconds'] for step in trial['steps']):.1f} s"
