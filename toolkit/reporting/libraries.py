"""Keep libraries from talking over a run: at import not at all, during the run into training.log only."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_NEVER = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""What these say at import is about compiled parts of other builds, which meldkit does not use."""

_INTO_THE_LOG = ("transformers", "trl", "peft", "accelerate", "datasets", "DeepSpeed")


@contextlib.contextmanager
def quiet_libraries(log_level: str) -> Iterator[None]:
    """Show only the errors of the libraries under us; everything with ``DEBUG``. Enter before they are imported.

    :func:`speak_into_the_log` ends it for the run itself.
    """
    if log_level == "DEBUG":
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    loggers = [logging.getLogger(name) for name in (*_NEVER, *_INTO_THE_LOG)]
    levels = [logger.level for logger in loggers]
    verbosity = os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it sets its level when it is imported
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings(
                    "ignore", category=category, module=r"(transformers|trl|peft|accelerate|torch)\b"
                )
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if verbosity == "error":
            os.environ.pop("TRANSFORMERS_VERBOSITY", None)


def speak_into_the_log() -> None:
    """Let the libraries' warnings through, past the terminal: call it when training.log listens to their loggers."""
    for name in _INTO_THE_LOG:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers[:]:
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
