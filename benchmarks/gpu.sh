#!/usr/bin/env bash
# Builds, checks and times everything that needs a GPU, in one call:
#   benchmarks/gpu.sh [OUTPUT.json]
# Needs a GPU, and torch, triton, timm, safetensors, wrapt and pytest already installed, or on PYTHONPATH; takes nothing
# from the network.
set -euo pipefail

output=$(realpath -m "${1:-$(dirname "$0")/results/gpu.json}")
cd "$(dirname "$0")/.."
mkdir -p "$(dirname "$output")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

python -c 'import pytest, safetensors, sys, timm, torch, triton, wrapt; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'

# a broken kernel is no reason to leave the others untimed: time on a GPU is scarce, and every row checks itself
status=0
python -m pytest -q -p no:cacheprovider tests/test_gpu_kernels.py tests/test_ulsam_layer.py || status=1
python -m benchmarks --only 'gpu/' --output "$output" || status=1
exit "$status"
