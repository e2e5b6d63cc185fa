"""The sample models and data that a configuration names (``sample:NAME``)."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from toolkit.cache_folder import cache_folder
from toolkit.cli.files import MODEL_OPTIONS, named_sources
from toolkit.collection import SAMPLE_PREFIX, is_there
from toolkit.errors import MeldkitError
from toolkit.terminal import err


def check_samples(config: Any) -> None:
    """Check the names, and make nothing.

    Raises:
        InputError: there is no such sample.
    """
    from toolkit.data.samples import catalog as data
    from toolkit.modeling.samples import catalog as models

    for option, source in _samples(config):
        (models if option in MODEL_OPTIONS else data).sample_name(source)


def make_samples(config: Any) -> None:
    """Make what is not in meldkit's cache yet, and say so.

    Raises:
        InputError, RunDirectoryError, MeldkitError: unknown, or it cannot be fetched.
    """
    from toolkit.data.samples import catalog as data
    from toolkit.modeling.samples import catalog as models

    for option, source in _samples(config):
        if option not in MODEL_OPTIONS:
            data.sample_folder(source, announce=err)
        elif getattr(config, "backend", None) == "unsloth":
            _make_model_apart(source)
        else:
            models.sample_folder(source, announce=err)


def _make_model_apart(source: str) -> None:
    """Make a sample model in a process of its own: it takes transformers, and Unsloth has to come before that."""
    from toolkit.modeling.samples.catalog import sample_name

    name = str(sample_name(source))
    if is_there(cache_folder() / "models" / name):
        return
    command = [sys.executable, "-m", "toolkit", "models", name]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        raise MeldkitError(f"{source} could not be made; the reason stands above")


def _samples(config: Any) -> Iterator[tuple[str, str]]:
    for option, source in named_sources(config):
        if source.startswith(SAMPLE_PREFIX):
            yield option, source
