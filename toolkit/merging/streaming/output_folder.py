"""The folder that a merge writes: never half there, never one of the inputs, never written by two at once."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from toolkit.durable import STAGING_PREFIX, TRASH_PREFIX, sync
from toolkit.errors import MergeError, RunDirectoryError

# What was replaced and is being deleted: never restored, as a part of it may be gone.
DISCARDED_PREFIX = ".discarded-"
# Names of what a killed merge leaves beside its output end with this many hexadecimal digits.
NUM_DIGITS = 12
# Room for companions and for the file system's own tables.
SPARE_BYTES = 32 << 20
# The folder of a model or adapter; another one may hold inputs (Fisher files) and the result side by side.
MODEL_FILES = ("config.json", "adapter_config.json")


def refuse_inputs(out: Path, paths: Iterable[Path]) -> None:
    """Raises RunDirectoryError if ``out`` is or holds a folder that the merge reads, or lies in that of a model.

    Args:
        out: of the result.
        paths: files and folders. Links are followed: a model in the hub's cache is a folder of links.
    """
    out = out.resolve()
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        if folder == out:
            raise RunDirectoryError(f"{out} is one of the inputs; a merge writes a folder of its own")
        if folder in out.parents and any((folder / name).is_file() for name in MODEL_FILES):
            raise RunDirectoryError(f"{out} lies in the input {folder}; choose a folder outside of it")
        if out in folder.parents:
            raise RunDirectoryError(f"{out} holds the input {folder}, which replacing it would delete")


def _folders(path: Path) -> list[Path]:
    """Where ``path`` lies: as it was given, with linked folders followed, with a linked file followed."""
    if path.is_dir():
        return [Path(os.path.abspath(path)), path.resolve()]
    return [Path(os.path.abspath(path)).parent, path.parent.resolve(), path.resolve().parent]


class OutputFolder:
    """``out`` while a merge writes it. Staged beside it; there under its name only when complete.

    Args:
        out: the final folder.
        digest: of everything that determines the result; names the staging folder, so that only the same merge goes on
            with it.
        overwrite: an existing folder is replaced when the new one is complete.

    Raises:
        RunDirectoryError: ``out`` exists, cannot be written, or another merge is writing it.
    """

    def __init__(self, out: Path, digest: str, *, overwrite: bool) -> None:
        out = Path(os.path.abspath(out))
        self._overwrite = overwrite
        self._parent = out.parent.resolve()
        self.path = self._parent / out.name
        self.staged = self._parent / f"{STAGING_PREFIX}{out.name}-{digest[:NUM_DIGITS]}"
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise RunDirectoryError(f"{out} cannot be written: {error.strerror}") from error
        try:
            self._restore_old()
            self.refuse_existing()
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        """A lock file beside the output, held by this process alone and gone with it."""
        path = self._parent / f".{self.path.name}.merging"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise RunDirectoryError(
                    f"another merge is writing {self.path}", hint="wait for it, or choose another folder"
                ) from None
            try:
                is_there = os.stat(path).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                is_there = False
            if is_there:
                return descriptor
            os.close(descriptor)  # its holder has just removed it

    def close(self) -> None:
        (self._parent / f".{self.path.name}.merging").unlink(missing_ok=True)
        os.close(self._lock)

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leftovers(self) -> list[Path]:
        """Staging folders of earlier merges into the same folder, this one's included."""
        return self._beside(STAGING_PREFIX)

    def discard(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder)

    def keep_only(self, kept: Iterable[Path]) -> None:
        """Remove what a killed merge was writing beside the weights; it is written again."""
        for path in set(self.staged.iterdir()) - set(kept):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def check_space(self, num_bytes: int) -> None:
        """Raises RunDirectoryError if the disk has no room for ``num_bytes`` and a little more."""
        disk = os.statvfs(self._parent)
        free = disk.f_bavail * disk.f_frsize
        if free < num_bytes + num_bytes // 100 + SPARE_BYTES:
            raise RunDirectoryError(
                f"{self._parent} has {free / 1e9:.2f} GB free, and the merge writes {num_bytes / 1e9:.2f} GB",
                hint="free some space, or choose a folder on another disk",
            )

    def refuse_existing(self) -> None:
        """Raises RunDirectoryError if the output is there and must not be replaced."""
        out = self.path
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise RunDirectoryError(f"{out} is {'a link' if out.is_symlink() else 'a file'}, not a folder")
        if out.exists() and not self._overwrite and any(out.iterdir()):
            raise RunDirectoryError(f"{out} exists and is not empty", hint="another folder, or --overwrite")

    def commit(self) -> None:
        """Make the staged folder the output. Its files and folders have been synced.

        Raises:
            RunDirectoryError: something has appeared under its name and must not be replaced.
            MergeError: it cannot be renamed; an old folder is then there again.
        """
        self.refuse_existing()
        old = None
        try:
            if self.path.exists() and any(self.path.iterdir()):
                old = self._unused(TRASH_PREFIX)
                os.rename(self.path, old)
            os.rename(self.staged, self.path)  # fails where a folder has just appeared that is not empty
        except OSError as error:
            if old is not None and old.exists():
                os.rename(old, self.path)
            raise MergeError(
                f"{self.staged} cannot be renamed to {self.path.name}: {error.strerror}"
            ) from error
        sync(self._parent)
        self._discard_old()

    def _restore_old(self) -> None:
        """A process killed between the two renames of ``commit`` has left the old folder under another name."""
        trash = self._beside(TRASH_PREFIX)
        if trash and not self.path.exists():
            os.rename(trash.pop(), self.path)
            sync(self._parent)
        self._discard_old()

    def _discard_old(self) -> None:
        """Delete what was replaced, under a name that nothing restores: a kill may leave a part of it."""
        if trash := self._beside(TRASH_PREFIX):
            for folder in trash:
                os.rename(folder, self._unused(DISCARDED_PREFIX))
            sync(self._parent)
        for discarded in self._beside(DISCARDED_PREFIX):
            shutil.rmtree(discarded, ignore_errors=True)  # the next merge tries again

    def _unused(self, prefix: str) -> Path:
        return self._parent / f"{prefix}{self.path.name}-{uuid.uuid4().hex[:NUM_DIGITS]}"

    def _beside(self, prefix: str) -> list[Path]:
        pattern = re.compile(re.escape(f"{prefix}{self.path.name}-") + rf"[0-9a-f]{{{NUM_DIGITS}}}")
        return sorted(path for path in self._parent.iterdir() if pattern.fullmatch(path.name))
