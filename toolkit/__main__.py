"""The command line: ``meldkit ...`` and ``python -m toolkit ...``."""

import gc
import sys

from toolkit.cli.main import main as run


def main() -> None:
    status = run(sys.argv[1:])
    if "triton" not in sys.modules:  # its bindings would report all that is not freed as leaks
        gc.freeze()  # the system takes all memory back; a last search for garbage takes a tenth of a second
    sys.exit(status)


if __name__ == "__main__":
    main()
