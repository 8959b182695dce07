#!/bin/sh
# Checks the Triton kernels on a GPU, then measures them; from the root of a checkout:
#
#     sh benchmark/gpu/run.sh [FOLDER FOR RESULTS, default out]
#
# Needs torch and triton, for FlashInfer as a peer also flashinfer. Neither SGLang nor an installation
# of the project is needed. Stops with 1 before measuring if a check fails.
set -eu
out=${1:-${OUT:-out}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
status=0
"$python" -m benchmark.gpu.check > "$out/gpu_check.txt" 2>&1 || status=$?
cat "$out/gpu_check.txt"
[ "$status" -eq 0 ] || exit 1
"$python" -m benchmark.gpu.decode_op --out "$out/gpu_decode_op.json"
