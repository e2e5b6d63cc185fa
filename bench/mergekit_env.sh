#!/usr/bin/env bash
# mergekit 0.1.5 in an environment of its own, for bench/merge.py and the parity tests: bash bench/mergekit_env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly ENVIRONMENT=.cache/bench/mergekit
torch=$(grep -E '^torch==' constraints.txt)
python3 -m venv "$ENVIRONMENT"
"$ENVIRONMENT/bin/python" -m pip install --quiet "$torch+cpu" || "$ENVIRONMENT/bin/python" -m pip install --quiet "$torch"
"$ENVIRONMENT/bin/python" -m pip install --quiet --constraint constraints.txt mergekit==0.1.5 pytest
# The parity tests import meldkit's merge engine there: pure Python, from this checkout.
"$ENVIRONMENT/bin/python" -m pip install --quiet --constraint constraints.txt filelock rich
"$ENVIRONMENT/bin/python" -c 'import mergekit, torch; print("mergekit 0.1.5 with torch", torch.__version__)'
