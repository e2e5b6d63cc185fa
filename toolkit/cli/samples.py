"""The sample models and data that a configuration names (``sample:NAME``)."""

from collections.abc import Iterator
from typing import Any

from toolkit.cli.files import MODEL_OPTIONS, named_sources
from toolkit.collection import SAMPLE_PREFIX
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
        (models if option in MODEL_OPTIONS else data).sample_folder(source, announce=err)


def _samples(config: Any) -> Iterator[tuple[str, str]]:
    for option, source in named_sources(config):
        if source.startswith(SAMPLE_PREFIX):
            yield option, source
