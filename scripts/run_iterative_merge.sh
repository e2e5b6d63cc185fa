#!/usr/bin/env bash
# Trains many locales at once, and merges them while they train. --help tells more.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash scripts/run_iterative_merge.sh [--locales A,B,...] [--gpu N] [OPTION ...]

Train many locales at once, and merge them while they train.

  --gpu 0, --gpu 0,1    GPUs to use; the locales are spread over them. On a machine without one the run is on the CPU

Every option goes on to the recipe. Without any, it trains with the values of recipes/configs/iterative_merge.yaml.
All of them: meldkit train iterative-merge --help

  bash scripts/run_iterative_merge.sh --locales en-US,fr-FR,de-DE --max-epochs 15 --merge-frequency 3 --dry-run
USAGE
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
# shellcheck source=scripts/find_python.sh disable=SC1091
source "$ROOT/scripts/find_python.sh"
for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit 0
    fi
done
python=
find_python
# Not `cd $ROOT`: paths among the options are relative to where the user stands.
exec "$python" "$ROOT/recipes/iterative_merge.py" "$@"
