#!/usr/bin/env bash
# Trains three locales of a real multilingual encoder and merges them while they train: what `make demo` runs. Options
# are handed to the training: bash scripts/demo.sh --max-epochs 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RUN=runs/demo

# A demonstration begins anew each time: an earlier one steps aside and is never overwritten.
if [[ -d $RUN ]]; then mv "$RUN" "$RUN-before-$(date +%Y%m%d-%H%M%S)"; fi
.venv/bin/python -m toolkit train iterative-merge --config recipes/configs/demo.yaml "$@"
