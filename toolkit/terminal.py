"""Plain output, with a little emphasis where the stream is a terminal that wants it."""

import os
import sys
from typing import TextIO

BOLD, DIM, RED = "1", "2", "31;1"
MIN_WIDTH, DEFAULT_WIDTH, MAX_WIDTH = 40, 100, 110


def width() -> int:
    """Columns to wrap text to."""
    return max(MIN_WIDTH, min(MAX_WIDTH, _columns() or DEFAULT_WIDTH))


def _columns() -> int:
    """Columns by COLUMNS or the terminal, else 0. (shutil knows this too; importing it costs 10 ms.)"""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):  # no terminal, or a stream of a test
        return 0


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return ``text`` in a style when ``stream`` (standard output) is a terminal; NO_COLOR and TERM=dumb
    count."""
    target: TextIO = sys.stdout if stream is None else stream
    if not target.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def usage_lines(text: str) -> list[str]:
    """Return "usage: TEXT", wrapped."""
    import textwrap  # the errors that need no wrapping come faster without

    return textwrap.wrap(f"usage: {text}", width(), subsequent_indent=" " * 7)


def out(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def err(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
