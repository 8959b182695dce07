"""A whole engine on a GPU: time of a decode step, PSA against SGLang's dense backends.

    python -m benchmark.gpu.serving --lengths 8192,32768 --batches 1,16
    python -m benchmark.gpu.serving --tiny          # without a GPU: it runs; its times mean nothing

A Llama of 8 billion parameters with random weights answers prompts of random token ids. The time of
a decode step is the slope between two output lengths, which start-up and prefill cancel from; the
prompts are in the prefix cache by then. Each variant is an ``sgl.Engine`` in a process of its own.
Keys of random weights are no text's: how much PSA reads of them (``bytes_fraction``, beside the
times) says nothing about quality, and a step that reads another share takes another time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.common import hardware, spread
from benchmark.gpu import plot

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
PSA = {"decode_attention_backend": "psa", "prefill_attention_backend": "fa3"}
GRAPH = {"psa_backend": "triton", "cuda_graph_backend_decode": "full"}
FLASHINFER = {"psa_backend": "flashinfer"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fa3": {"attention_backend": "fa3"},
    "flashinfer": {"attention_backend": "flashinfer"},
    "triton": {"attention_backend": "triton"},
    "psa dense": PSA | GRAPH | {"psa_policy": "dense"},
    "psa": PSA | GRAPH,
    "psa, groups of 4": PSA | GRAPH | {"psa_group_percent": 0},
    "psa, groups of 16": PSA | GRAPH | {"psa_group_pages": 16, "psa_group_percent": 0},
    "psa, predicted": PSA | GRAPH | {"psa_predict": True},
    "psa, flashinfer": PSA | GRAPH | FLASHINFER,
    "psa, no graph": PSA | {"psa_backend": "triton", "cuda_graph_backend_decode": "disabled"},
}
TINY_VARIANTS: dict[str, dict[str, Any]] = {
    "torch_native": {"attention_backend": "torch_native"},
    "psa": {"attention_backend": "psa", "psa_min_context": 0},
}


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """The configuration of a model; its weights are made up when it is loaded."""
    (folder / "config.json").write_text(json.dumps(shape))


def answer(engine: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, float | None]:
    """Seconds, and the mean share of bytes that PSA read, if it ran."""
    params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=params)
    seconds = time.perf_counter() - begin
    shares = [out["meta_info"]["psa"]["bytes_fraction"] for out in outputs if psa_ran(out)]
    return seconds, sum(shares) / len(shares) if shares else None


def psa_ran(out: dict[str, Any]) -> bool:
    return out["meta_info"].get("psa", {}).get("bytes_fraction") is not None


def measure(engine: Any, length: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a decode step of ``batch`` requests of about ``length`` tokens."""
    import numpy as np

    rng = np.random.default_rng(length + batch)
    prompts = [rng.integers(2, options.vocabulary, length).tolist() for _ in range(batch)]
    short, long = options.new_tokens, 4 * options.new_tokens
    # Two runs: the first fills the prefix cache.
    for _ in range(2):
        answer(engine, prompts, short)
    steps, share = [], None
    for _ in range(options.rounds):
        less, _ = answer(engine, prompts, short)
        more, share = answer(engine, prompts, long)
        steps.append((more - less) / (long - short) * 1e3)
    return {"length": length, "batch": batch, "step_ms": spread(steps), "bytes_fraction": share}


def run_variant(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths and batches on one engine."""
    from sglang_psa import compat

    compat.load_plugins()
    import sglang

    variants = TINY_VARIANTS if options.tiny else VARIANTS
    lengths, batches = numbers(options.lengths), numbers(options.batches)
    arguments: dict[str, Any] = {
        "model_path": options.model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "page_size": 16,
        "log_level": "warning",
        "random_seed": 1,
        "cuda_graph_max_bs_decode": max(batches),
        "context_length": max(lengths) + 8 * options.new_tokens,
        **variants[name],
    }
    if options.tiny:
        arguments |= {"max_total_tokens": 8192, "mem_fraction_static": 0.2}
        del arguments["cuda_graph_max_bs_decode"]
    engine = sglang.Engine(**arguments)
    rows = []
    try:
        for length in lengths:
            for batch in batches:
                if length * batch <= options.max_tokens:
                    rows.append(measure(engine, length, batch, options))
                    print(name, rows[-1], file=sys.stderr, flush=True)
    finally:
        engine.shutdown()
    return rows


def run_apart(command: list[str], log: Path, seconds: int) -> bool:
    """Whether a command succeeds in time; none of its processes outlives it."""
    with log.open("w") as where:
        process = subprocess.Popen(command, stdout=where, stderr=where, start_new_session=True)
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            where.write(f"ended after {seconds} s\n")
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--max-tokens", type=int, default=600_000, help="in one batch")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=240, help="for one variant")
    parser.add_argument("--variants", help="names, separated by ;")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_serving.json"))
    options = parser.parse_args()
    shape = TINY if options.tiny else LLAMA_8B
    options.vocabulary = shape["vocab_size"]
    if options.one:
        options.out.write_text(json.dumps(run_variant(options.one, options)))
        return
    known = list(TINY_VARIANTS if options.tiny else VARIANTS)
    names = options.variants.split(";") if options.variants else known
    report: dict[str, Any] = {"hardware": hardware(), "results": {}, "missing": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, part = Path(folder) / "model", Path(folder) / "part.json"
        model.mkdir()
        write_model(model, shape)
        for name in names:
            part.unlink(missing_ok=True)
            log = options.out.with_name(f"{options.out.stem}_{known.index(name)}.log")
            command = [sys.executable, "-m", "benchmark.gpu.serving", *sys.argv[1:]]
            command += ["--one", name, "--model", str(model), "--out", str(part)]
            if run_apart(command, log, options.seconds) and part.exists():
                report["results"][name] = json.loads(part.read_text())
            else:
                report["missing"][name] = f"failed, see {log.name}"
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(table(name, report), flush=True)
    if report["results"]:
        print(plot.picture(report, options.out))
    sys.exit(1 if report["missing"] else 0)


def table(name: str, report: dict[str, Any]) -> str:
    if name in report["missing"]:
        return f"{name:20} {report['missing'][name]}"
    lines = []
    for row in report["results"][name]:
        share = row["bytes_fraction"]
        read = "" if share is None else f", reads {share:.1%}"
        lines.append(
            f"{name:20} batch {row['batch']:3} {row['length']:7} tokens "
            f"{row['step_ms']['median']:8.3f} ms a step{read}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
