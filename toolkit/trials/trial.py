"""A trial's process: ``python -m toolkit.trials.trial SPEC.json``."""

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from toolkit.benchmarks.process import FAILED, FELL_BACK, OUT_OF_MEMORY
from toolkit.durable import write_json

OOM_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "MemoryError")


def main(path: str) -> int:
    """Run the program of the specification in ``path``; returns the exit status."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    program = spec["arm"]["program"]
    try:
        if os.sep in program:
            sys.argv = [program, path]
            runpy.run_path(program, run_name="__main__")
        else:
            importlib.import_module(f"toolkit.trials.{program}").run(spec)
    except BaseException as error:
        traceback.print_exc()
        _write_error(Path(spec["error"]), error)
        return _status_of(error)
    return 0


def _status_of(error: BaseException) -> int:
    from toolkit.errors import BackendError

    if isinstance(error, BackendError):
        return FELL_BACK
    text = f"{type(error).__name__}: {error}"
    is_oom = isinstance(error, MemoryError) or any(sign in text for sign in OOM_SIGNS)
    return OUT_OF_MEMORY if is_oom else FAILED


def _write_error(path: Path, error: BaseException) -> None:
    lines = str(error).strip().splitlines()
    facts: dict[str, Any] = {"type": type(error).__name__, "message": lines[0] if lines else ""}
    write_json(path, facts)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
