#!/usr/bin/env bash
# Measures the CUDA kernels and runs the tests marked gpu, in one command, on a machine with an NVIDIA GPU.
#
#   bash bench/gpu.sh                      figures into bench/results/gpu_kernels.json
#   PYTHON=python3 bash bench/gpu.sh       with an interpreter that has torch (CUDA), triton and meldkit
#   bash bench/gpu.sh --rounds 5 --layers 4
#
# Exit status: 0 all well, 1 a test failed or a goal was missed, 2 something is not there that this needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}

missing() {
    printf 'gpu.sh: %s\n' "$1" >&2
    exit 2
}

if [[ ! -x $(command -v "$python" || true) ]]; then
    missing "$python is not there: run make setup, or name an interpreter with PYTHON=."
fi
if ! "$python" -c 'import toolkit_kernels, torch, pytest' 2>/dev/null; then
    missing "$python has no meldkit, torch or pytest: run make setup TORCH=cuda."
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    missing "torch sees no CUDA device here (nvidia-smi shows whether the driver does; make setup TORCH=cuda installs the build of torch for it)."
fi
if ! "$python" -c 'import triton' 2>/dev/null; then
    missing "triton is not installed: CUDA builds of torch bring it, make setup TORCH=cuda."
fi

status=0
"$python" -m pytest -m gpu tests || status=1
"$python" bench/gpu_kernels.py --out bench/results/gpu_kernels.json "$@" || status=1
exit "$status"
