"""A launcher in a process of its own, for tests with signals: ``python -m start_probe NUM MODULE ...``."""

import sys

from toolkit.config.options import LaunchOptions
from toolkit.launch.launcher import run
from toolkit.launch.plan import resolve_plan

if __name__ == "__main__":
    plan = resolve_plan(LaunchOptions(num_processes=int(sys.argv[1]), cpu=True))
    sys.exit(run(plan, sys.argv[2:]))
