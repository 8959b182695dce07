#!/bin/sh
# Checks the Triton kernels on a GPU, then measures them; from the root of a checkout:
#
#     MODEL=FOLDER sh benchmark/gpu/run.sh [FOLDER FOR RESULTS, default out] [STAGE]
#
# Stages: ops, memory, serving. Without a stage, all of them. The checks, the operators and the tier
# of pages on the host (memory: 10 GiB of RAM that can be pinned) need torch and triton; FlashInfer, FlashAttention 3 and SGLang's
# kernels are peers where they are installed. Whole servers need SGLang and this project
# (pip install .) and are left out where they are missing. Under memory they serve the model in
# MODEL (weights and tokenizer; without it, the embedded one): over two tiers the greedy tokens must
# be those of the all-resident server, then `python -m benchmark.memory` measures both. Results are
# JSON files in the folder. Stops with 1 before measuring if a check fails.
set -eu
out=${1:-${OUT:-out}}
only=${2:-all}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
status=0
installed() {
    "$python" -c 'import importlib.metadata as m; m.version("sglang"); m.version("sgl-psa")' && return
    echo "benchmark.$1 left out: SGLang or sgl-psa is not installed"
    return 1
}
"$python" -m benchmark.gpu.check > "$out/gpu_check.txt" 2>&1 || status=$?
cat "$out/gpu_check.txt"
[ "$status" -eq 0 ] || exit 1
if [ "$only" = all ] || [ "$only" = ops ]; then
    "$python" -m benchmark.gpu.decode_op --out "$out/gpu_decode_op.json"
fi
if [ "$only" = all ] || [ "$only" = memory ]; then
    "$python" -m benchmark.gpu.check_memory > "$out/gpu_check_memory.txt" 2>&1 || status=$?
    cat "$out/gpu_check_memory.txt"
    [ "$status" -eq 0 ] || exit 1
    if installed gpu.check_tiers; then
        set -- --device cuda --dtype bfloat16 ${MODEL:+--model "$MODEL"}
        "$python" -m benchmark.gpu.check_tiers "$@" --logs "$out" \
            > "$out/gpu_check_tiers.txt" 2>&1 || status=$?
        cat "$out/gpu_check_tiers.txt"
        [ "$status" -eq 0 ] || exit 1
    fi
    "$python" -m benchmark.gpu.memory_op --out "$out/gpu_memory.json"
    if installed memory; then
        # Here answers may differ: batches form otherwise on every server.
        "$python" -m benchmark.memory "$@" --only decode --out "$out/gpu" \
            || echo "benchmark.memory: answers differ, or servers are missing; see above"
    fi
fi
if [ "$only" = all ] || [ "$only" = serving ]; then
    if installed gpu.serving; then
        "$python" -m benchmark.gpu.serving --out "$out/gpu_serving.json"
    fi
fi
