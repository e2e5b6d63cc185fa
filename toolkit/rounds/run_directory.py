"""The run directory: one run, one writer, nothing of another run touched."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from toolkit.durable import STAGING_PREFIX, TRASH_PREFIX, clear_leftovers, write_json
from toolkit.errors import RunDirectoryError
from toolkit.rounds.journal import JOURNAL_NAME, Journal

CONFIG_NAME = "experiment_config.json"
ENVIRONMENT_NAME = "environment.json"
LOCK_NAME = "run.lock"

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "resume",
        "output_dir",
        "data_cache",
        "keep_checkpoints",
        "log_level",
        "main_process_port",
        "project",
        "report_to",
        "run_name",
        "gpu",
        "skip_data_check",
    }
)
"""Options that do not touch what is computed."""

_BEFORE_A_RUN = {CONFIG_NAME, LOCK_NAME}
"""Files that may lie in the folder before a run begins there (--save-config)."""


class RunDirectory:
    """A run directory that this process may write to.

    Until :meth:`begin` nothing but a lock lies there: a run that fails on wrong input leaves the folder as it was.

    Args:
        path: created where it is missing.
        config: the resolved options as JSON values.
        recipe: the recipe's name.
        resume: continue the run that is there.
        is_main_process: only this one locks and writes.

    Raises:
        RunDirectoryError: the folder holds another run or other files, another process is running it, there is nothing
            to resume, or the options differ from those it was started with.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], *, recipe: str, resume: bool, is_main_process: bool = True
    ) -> None:
        self.path = path
        self.is_main_process = is_main_process
        self._config = config
        self._recipe = recipe
        self._lock: int | None = None
        self._is_new_folder = not path.exists()
        if is_main_process:
            try:
                self._prepare(config, recipe, resume)
            except BaseException:
                self.close()
                raise
        self.journal = Journal(path, writable=is_main_process)

    @property
    def is_finished(self) -> bool:
        return bool(self.journal.records("finished"))

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Compare what the run stands on with what it was started on.

        Raises:
            RunDirectoryError: something differs.
        """
        started = self.journal.records("started")
        for name, value in facts.items():
            before = started[0].get(name) if started else value
            if before != value:
                raise RunDirectoryError(
                    f"{self.path}: {name.replace('_', ' ')} is {value}, the run was started with {before}",
                    hint="restore it, or start a new run in another --output-dir",
                )

    def changed_versions(self, versions: dict[str, Any]) -> list[str]:
        """Packages whose version is not the one that the run was started with, in words."""
        try:
            stored = json.loads((self.path / ENVIRONMENT_NAME).read_text(encoding="utf-8"))["versions"]
        except (OSError, ValueError, KeyError):
            return []
        return [
            f"{name} went from {stored.get(name)} to {versions.get(name)}"
            for name in sorted(stored.keys() | versions.keys())
            if stored.get(name) != versions.get(name)
        ]

    def begin(self, facts: dict[str, Any], environment: dict[str, Any]) -> None:
        """From here on the folder holds a run: write its configuration, its environment and the first journal lines.

        Args:
            facts: what the run stands on: fingerprints, number of processes.
            environment: written to environment.json, with the facts.
        """
        if not self.is_main_process:
            return
        if not self.journal.records():
            write_json(self.path / CONFIG_NAME, self._config)
            self.journal.append("created", recipe=self._recipe, config=self._config)
        self.journal.append("started", **facts)
        write_json(self.path / ENVIRONMENT_NAME, environment | facts)

    def close(self) -> None:
        """Release the folder; one that this object made and that holds no run is removed."""
        if self._lock is None:
            return
        if not self._foreign_files() or (self.path / JOURNAL_NAME).exists():
            clear_leftovers(self.path)
        if not (self.path / JOURNAL_NAME).exists():
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            if self._is_new_folder and not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None

    def _prepare(self, config: dict[str, Any], recipe: str, resume: bool) -> None:
        has_run = (self.path / JOURNAL_NAME).is_file()
        if resume and not has_run:
            raise RunDirectoryError(
                f"nothing to resume: {self.path} holds no run", hint="leave --resume out to start one there"
            )
        if not resume and has_run:
            raise RunDirectoryError(
                f"{self.path} holds another run",
                hint="--resume continues it; another --output-dir starts a new one",
            )
        self._create()
        self._take_lock()
        if resume:
            self._check_drift(config, recipe)
        elif others := self._foreign_files():
            raise RunDirectoryError(
                f"{self.path} is not empty and holds no run of meldkit ({', '.join(others[:4])})",
                hint="give an empty or a new --output-dir",
            )
        clear_leftovers(self.path)

    def _foreign_files(self) -> list[str]:
        names = sorted(path.name for path in self.path.iterdir())
        return [
            n for n in names if n not in _BEFORE_A_RUN and not n.startswith((STAGING_PREFIX, TRASH_PREFIX))
        ]

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / LOCK_NAME
            probe.touch()
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written to: {error.strerror}") from error

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / LOCK_NAME, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)  # nothing more: the folder is the other process's
            raise RunDirectoryError(
                f"{self.path} is in use by another process", hint="wait for it, or give another --output-dir"
            ) from error
        self._lock = descriptor

    def _check_drift(self, config: dict[str, Any], recipe: str) -> None:
        created = Journal(self.path).records("created")
        if not created:
            return
        before = created[0]
        if before["recipe"] != recipe:
            raise RunDirectoryError(f"{self.path} holds a run of {before['recipe']}, not of {recipe}")
        stored: dict[str, Any] = before["config"]
        changed = [
            f"  {name}: {stored.get(name)!r} before, {config.get(name)!r} now"
            for name in sorted(stored.keys() | config.keys())
            if name not in MAY_CHANGE_ON_RESUME and stored.get(name) != config.get(name)
        ]
        if changed:
            raise RunDirectoryError(
                "\n".join([f"{self.path} was started with other options:", *changed]),
                hint=f"resume with --config {self.path / CONFIG_NAME} --resume",
            )
