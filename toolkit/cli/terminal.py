"""Plain output, with a little emphasis where the stream is a terminal that wants it."""

import os
import shutil
import sys
from typing import TextIO

BOLD, DIM, RED = "1", "2", "31;1"
MIN_WIDTH, MAX_WIDTH = 40, 110


def width() -> int:
    """Columns to wrap text to."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns))


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return ``text`` in a style when ``stream`` (standard output) is a terminal; NO_COLOR and TERM=dumb
    count."""
    target: TextIO = sys.stdout if stream is None else stream
    if not target.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def out(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def err(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
