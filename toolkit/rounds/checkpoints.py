"""Checkpoints of a participant: committed whole, found again, deleted only when newer ones are safe.

``<run>/<participant>/checkpoints/checkpoint-00000120/`` is complete when it is there, and counts once the journal says
so. Whatever else lies there comes from a process that was killed, and is removed when the run goes on. Of a participant
that merges, ``checkpoint-00000120-merges-3`` is the state after 120 steps and 3 merges that it has taken over.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.durable import STAGING_PREFIX, clear_leftovers, commit_folder, discard_folder, verify_folder
from toolkit.errors import CheckpointError
from toolkit.rounds.journal import Journal
from toolkit.training.contract import ParticipantTrainer

logger = logging.getLogger(__name__)

FREE_SPACE_FACTOR = 1.1
"""Free space that must be there before a checkpoint is begun, in sizes of the checkpoint before it."""


class CheckpointStore:
    """The checkpoints of one participant.

    Args:
        run_dir: the run directory.
        participant: the participant's name.
        journal: of the run.
        keep: how many are kept.
        process_state: accelerate's PartialState: who is the first process, and the barrier between all.
    """

    def __init__(
        self, run_dir: Path, participant: str, journal: Journal, *, keep: int, process_state: Any
    ) -> None:
        self.folder = run_dir / participant / "checkpoints"
        # Beside the participants' folders: the Trainer makes it before the run has begun.
        self.staging = run_dir / f"{STAGING_PREFIX}{participant}"
        self._participant = participant
        self._journal = journal
        self._keep = keep
        self._processes = process_state

    def commit(self, trainer: ParticipantTrainer, *, merges: int = 0) -> Path:
        """Save the trainer's state durably and return the folder. On all processes.

        Args:
            merges: how many merges the participant has taken over: its state changes by them, its step does not.

        Raises:
            CheckpointError: the disk is full or fails; earlier checkpoints are untouched.
        """
        final = self.folder / (f"checkpoint-{trainer.step:08d}" + (f"-merges-{merges}" if merges else ""))
        if any(r["path"] == final.name for r in self._committed()):
            return final
        self._check_free_space()
        num_bytes = 0
        try:
            staged = trainer.save()
            self._processes.wait_for_everyone()
            if self._processes.is_main_process:
                facts = {"participant": self._participant, "step": trainer.step}
                files = commit_folder(staged, final, facts)["files"]
                num_bytes = sum(file["num_bytes"] for file in files.values())
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {trainer.step} could not be written to {self.folder}: {error}",
                hint="make room on the disk and run the same command with --resume; earlier checkpoints are intact",
            ) from error
        self._journal.append(
            "checkpoint",
            participant=self._participant,
            step=trainer.step,
            path=final.name,
            num_bytes=num_bytes,
        )
        for record in self._committed()[: -self._keep]:
            self._delete(record)
        self._processes.wait_for_everyone()
        return final

    def find(self, name: str) -> Path:
        """The committed checkpoint of that folder name, after comparing its files with what was committed.

        Raises:
            CheckpointError: it is not there or not intact.
        """
        if not any(r["path"] == name for r in self._committed()):
            raise CheckpointError(f"{self.folder / name} was never committed, or was deleted since")
        verify_folder(self.folder / name)
        return self.folder / name

    def latest(self) -> Path | None:
        """The newest committed checkpoint whose files are what was committed; None when there never was one.

        Raises:
            CheckpointError: there were checkpoints and none is intact: the run must not begin again unnoticed.
        """
        records = self._committed()
        for record in reversed(records):
            folder = self.folder / record["path"]
            try:
                verify_folder(folder)
            except CheckpointError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
                continue
            return folder
        if records:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact", hint="start again in another --output-dir"
            )
        return None

    def recover(self) -> None:
        """Remove what a killed process left behind, and checkpoints that the journal does not know."""
        clear_leftovers(self.folder)
        if not self.folder.is_dir():
            return
        known = {record["path"] for record in self._committed()}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in known:
                discard_folder(folder)

    def forget_after(self, step: int) -> None:
        """Discard committed checkpoints of later steps (damaged ones, after a fall-back): they will be made again."""
        for record in self._committed():
            if record["step"] > step:
                self._delete(record)

    def forget_behind(self, name: str | None) -> None:
        """Discard the checkpoints that were committed after the one of that name (all, for None)."""
        committed = self._committed()
        names = [record["path"] for record in committed]
        for record in committed[0 if name is None else names.index(name) + 1 :]:
            self._delete(record)

    def _committed(self) -> list[dict[str, Any]]:
        there: dict[str, dict[str, Any]] = {}
        for record in self._journal.records():
            if record.get("participant") != self._participant:
                continue
            if record["event"] == "checkpoint":
                there[record["path"]] = record
            elif record["event"] == "checkpoint_deleted":
                there.pop(record["path"], None)
        return list(there.values())

    def _delete(self, record: dict[str, Any]) -> None:
        # The journal first: a folder that it no longer knows is removed by recover(), never resumed from.
        self._journal.append("checkpoint_deleted", participant=self._participant, path=record["path"])
        folder = self.folder / record["path"]
        if self._processes.is_main_process and folder.exists():
            discard_folder(folder)

    def _check_free_space(self) -> None:
        records = self._committed()
        if not records or not self._processes.is_main_process:
            return
        needed = int(records[-1]["num_bytes"] * FREE_SPACE_FACTOR)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: {free / 1e6:.0f} MB are free, the next checkpoint needs {needed / 1e6:.0f} MB",
                hint="make room on the disk and run the same command with --resume; earlier checkpoints are intact",
            )
