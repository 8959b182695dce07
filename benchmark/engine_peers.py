"""Whole engine on CPU: prefill and decode time of PSA against SGLang's torch_native.

    python -m benchmark.engine_peers --lengths 2048,8192,16000

Each backend is a real ``sgl.Engine`` with the same model, page size and 2k prefill chunks; all are
up at the same time and answer the same prompts in turn. A prompt is random token ids, so no two
share a prefix and attention is what the model makes of noise: how much PSA reads here says nothing
about quality (``make eval`` does). Prefill is the time to the first token, decode the
mean time of a further one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from benchmark.common import plot_lines, save, spread

BACKENDS: dict[str, dict[str, Any]] = {
    "torch_native": {"attention_backend": "torch_native"},
    "psa_dense": {"attention_backend": "psa", "psa_policy": "dense"},
    "psa": {"attention_backend": "psa"},
}


def start(options: argparse.Namespace, arguments: dict[str, Any]) -> Any:
    """A quiet engine without prefix cache."""
    import sglang

    return sglang.Engine(
        model_path=options.model,
        page_size=options.page_size,
        chunked_prefill_size=options.chunk,
        disable_radix_cache=True,
        max_total_tokens=options.tokens,
        mem_fraction_static=0.25,
        sleep_on_idle=True,
        log_level="warning",
        **arguments,
    )


def answer(engine: Any, ids: list[int], new_tokens: int) -> tuple[float, float, dict[str, Any]]:
    """Seconds to the first token, milliseconds a further token, and the answer's meta_info."""
    params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    first, meta = 0.0, {}
    for chunk in engine.generate(input_ids=ids, sampling_params=params, stream=True):
        first = first or time.perf_counter() - begin
        meta = chunk["meta_info"]
    step = (time.perf_counter() - begin - first) / max(1, meta["completion_tokens"] - 1)
    return first, step * 1e3, meta


def measure(engines: dict[str, Any], length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds; in each round every engine answers the same prompt."""
    rng = np.random.default_rng(length)
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    decode: dict[str, list[float]] = {name: [] for name in engines}
    fraction = 1.0
    for _ in range(options.rounds):
        ids = rng.integers(300, 4000, length).tolist()
        for name, engine in engines.items():
            first, step, meta = answer(engine, ids, options.new_tokens)
            prefill[name].append(first)
            decode[name].append(step)
            if name == "psa":
                fraction = meta["psa"]["bytes_fraction"]
    row: dict[str, Any] = {"length": length, "psa_bytes_fraction": fraction}
    for label, samples in (("prefill_s", prefill), ("decode_ms", decode)):
        row[label] = {name: spread(values) for name, values in samples.items()}
        base = row[label]["torch_native"]["median"]
        row[f"{label}_torch_native_over"] = {
            name: base / row[label][name]["median"] for name in engines if name != "torch_native"
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sgl_psa/assets/recall")
    parser.add_argument("--lengths", default="2048,8192,16000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40000)
    options = parser.parse_args()
    engines = {name: start(options, arguments) for name, arguments in BACKENDS.items()}
    try:
        for engine in engines.values():
            answer(engine, list(range(300, 400)), 4)
        rows = []
        for length in map(int, options.lengths.split(",")):
            row = measure(engines, length, options)
            rows.append(row)
            print(length, row["prefill_s_torch_native_over"], row["decode_ms_torch_native_over"])
    finally:
        for engine in engines.values():
            engine.shutdown()
    report = {"what": "wall time, real engines, interleaved", "options": vars(options)}
    print(save("engine_peers", {**report, "results": rows}))
    for label, unit in (("prefill_s", "seconds to first token"), ("decode_ms", "ms a step")):
        series = {
            name: [(r["length"], r[label][name]["median"]) for r in rows] for name in BACKENDS
        }
        plot_lines(f"engine_{label}", series, "prompt (tokens)", unit)


if __name__ == "__main__":
    main()
