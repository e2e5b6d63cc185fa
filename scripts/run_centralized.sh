#!/usr/bin/env bash
# Trains one model on all the data, in one place. --help tells more.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash scripts/run_centralized.sh [--framework hf|unsloth] [--gpu N] [OPTION ...]

Train one model on all the data, in one place.

  --framework hf        the Hugging Face stack (the default)
  --framework unsloth   the same run with Unsloth
  --gpu 0, --gpu 0,1    GPUs to use; on a machine without one the run is on the CPU

Every other option goes on to the recipe; both take the same ones. Without any, it trains with the values of
recipes/configs/centralized_hf.yaml. All of them: meldkit train centralized-hf --help

  bash scripts/run_centralized.sh --framework hf --gpu 0 --max-epochs 1 --dry-run
USAGE
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
# shellcheck source=scripts/find_python.sh disable=SC1091
source "$ROOT/scripts/find_python.sh"
framework=hf
arguments=()
while (($# > 0)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --framework)
            if (($# < 2)); then fail "--framework needs a value" "--framework hf, or --framework unsloth"; fi
            framework=$2
            shift
            ;;
        --framework=*) framework=${1#--framework=} ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

case $framework in
    hf | unsloth) recipe=$ROOT/recipes/centralized_$framework.py ;;
    *) fail "there is no framework '$framework'" "--framework hf, or --framework unsloth" ;;
esac
python=
find_python
# Not `cd $ROOT`: paths among the options are relative to where the user stands.
exec "$python" "$recipe" ${arguments[@]+"${arguments[@]}"}
