"""The command line: ``meldkit ...`` and ``python -m toolkit ...``."""

import sys

from toolkit.cli.main import main as run


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
