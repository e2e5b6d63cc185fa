#!/usr/bin/env bash
# Trains a real language model on real conversations: what `make demo-chat` runs. Options are handed to the training:
# bash scripts/demo_chat.sh --max-steps 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

meldkit() {
    .venv/bin/python -m toolkit "$@"
}

readonly MODEL=.cache/models/smollm2-135m-instruct
readonly DATA=.cache/data/conversations
readonly RUN=runs/demo-chat

# Both keep what is complete already.
meldkit models smollm2-135m-instruct --out "$MODEL"
meldkit data samples conversations --source intents --rows-per-intent 40 --out "$DATA"
# A demonstration begins anew each time: an earlier one steps aside and is never overwritten.
if [[ -d $RUN ]]; then mv "$RUN" "$RUN-before-$(date +%Y%m%d-%H%M%S)"; fi
meldkit train centralized-hf --config recipes/configs/demo_chat.yaml "$@"
