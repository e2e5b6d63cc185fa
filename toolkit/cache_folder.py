"""Where meldkit keeps what it can fetch or compute again."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$MELDKIT_CACHE, else ``meldkit`` in $XDG_CACHE_HOME, else ~/.cache/meldkit. It need not exist."""
    if chosen := environ.get("MELDKIT_CACHE"):
        return Path(chosen).expanduser()
    # A relative $XDG_CACHE_HOME counts for nothing, says its specification.
    shared = Path(environ.get("XDG_CACHE_HOME", "")).expanduser()
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "meldkit"
