"""Unsloth's way into a process: first, alone, and quietly.

Unsloth changes transformers, TRL and PEFT while it is imported and exports environment variables, so it comes before
them, in a process that trains with nothing else. Nothing of meldkit imports it to look.
"""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import re
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from toolkit.cache_folder import cache_folder
from toolkit.dependencies import is_installed
from toolkit.errors import LaunchError, MissingDependencyError

PATCHED = ("transformers", "trl", "peft")
"""What Unsloth has to be imported before."""
BOUND = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth-zoo")
"""Packages whose versions Unsloth is particular about. It may be installed without its dependencies, so that pip has
not looked."""

logger = logging.getLogger(__name__)


def check_installation() -> None:
    """Look whether Unsloth is installed beside versions that it works with, without importing it.

    Raises:
        MissingDependencyError: it is not.
        LaunchError: a package has another version than it asks for.
    """
    if not is_installed("unsloth"):
        raise MissingDependencyError("unsloth", purpose="--backend unsloth", extra="unsloth")
    unfit = []
    for line in importlib.metadata.requires("unsloth") or []:
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name not in BOUND or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not wanted.specifier.contains(found, prereleases=True):
            unfit.append(f"{name}{wanted.specifier} (here: {found})")
    if unfit:
        version = importlib.metadata.version("unsloth")
        raise LaunchError(
            f"unsloth {version} asks for {'; '.join(unfit)}",
            hint="install with the versions of constraints.txt, which work together, or train with --backend hf",
        )


def enter_unsloth(device: str) -> None:
    """Import Unsloth for a run on ``device`` (``cpu`` or ``cuda``); what it prints goes into the log.

    Call :func:`check_installation` before.

    Raises:
        LaunchError: it comes too late in this process, does not run here, or would train on another device.
    """
    if "unsloth" not in sys.modules:
        early = [name for name in PATCHED if name in sys.modules]
        if early:
            raise LaunchError(
                f"this process has imported {', '.join(early)}, and Unsloth has to come first",
                hint="start with `meldkit train`, or from a script that imports neither before the run",
            )
        _set_environment(device)
        with into_the_log():
            _import()
    found = importlib.import_module("unsloth").DEVICE_TYPE
    if found != device:
        raise LaunchError(
            f"Unsloth would train on {found}, and the launch plan says {device}",
            hint="--cpu, or a build of torch that sees the GPU",
        )


def _import() -> None:
    try:
        importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LaunchError(f"Unsloth cannot be imported here: {first_line}") from error


def _set_environment(device: str) -> None:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # a run sends nothing anywhere
    # Else into a folder of the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled_cache"))
    if device == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"  # it refuses a CPU where it finds a GPU's driver


@contextlib.contextmanager
def into_the_log() -> Iterator[None]:
    """Log what is printed, and take back the handlers that Unsloth gives the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for line in said.getvalue().splitlines():
            if line.strip():
                logger.debug("%s", line.strip())
