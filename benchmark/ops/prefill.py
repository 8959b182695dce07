"""Attention of a prefill chunk over its prefix and itself: C++, torch's flash attention, SGLang's.

    python -m benchmark.ops.prefill

32 query and 8 KV heads of 128. ``cpu`` is the C++ kernel, ``torch`` the same two parts with torch's
flash attention (in float32 where torch is faster so), ``torch_native`` what SGLang's backend of
that name runs: queries padded to the whole length, one causal SDPA. ``gflops`` counts products of
queries with keys that they see. Medians of interleaved rounds; one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sgl_psa_kernels._native import native_available
from sgl_psa_kernels.prefill_attention import native, torch_flash
from torch.nn.functional import scaled_dot_product_attention

from benchmark.common import integers, write_rows
from benchmark.panels import save_panels

QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def ways(
    new: int, prefix: int, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]:
    """The peers, on the same tensors: out [new, Hq, D] and, from some, lse."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(new, QUERY_HEADS, DIM, generator=rng).to(dtype)
    k, v = torch.randn(2, prefix + new, KV_HEADS, DIM, generator=rng).to(dtype)
    scale = DIM**-0.5
    past = [(k[:prefix], v[:prefix])] if prefix else []
    chunk = (k[prefix:], v[prefix:])

    def padded() -> tuple[torch.Tensor, None]:
        whole = torch.empty(prefix + new, QUERY_HEADS, DIM, dtype=dtype)
        whole[prefix:] = q
        out = scaled_dot_product_attention(
            *(x.movedim(0, 1)[None] for x in (whole, k, v)),
            scale=scale,
            is_causal=True,
            enable_gqa=True,
        )
        return out[0].movedim(1, 0)[prefix:], None

    return {
        "cpu": lambda: native.prefill(q, past, *chunk, sm_scale=scale),
        "torch": lambda: torch_flash.prefill(q, past, *chunk, sm_scale=scale),
        "torch_native": padded,
    }


def measure(new: int, prefix: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every peer."""
    times: dict[str, list[float]] = {}
    peers = ways(new, prefix, DTYPES[dtype])
    for _ in range(rounds):
        for name, run in peers.items():
            begin = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - begin)
    products = 4 * QUERY_HEADS * DIM * new * (prefix + new / 2)
    medians = {name: statistics.median(mine) for name, mine in times.items()}
    return [
        {
            "op": "prefill",
            "backend": name,
            "isa": native_available()[1] if name == "cpu" else "torch",
            "dtype": dtype,
            "new_tokens": new,
            "context": prefix + new,
            "threads": torch.get_num_threads(),
            "ms_median": 1e3 * median,
            "gflops": products / median / 1e9,
            "vs_torch_native": medians["torch_native"] / median,
        }
        for name, median in medians.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Speed by context, a panel a dtype."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        points = panels.setdefault(row["dtype"], {}).setdefault(row["backend"], [])
        points.append((row["context"], row["gflops"]))
    return save_panels(path, panels, "tokens of context", "GFLOP/s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--prefixes", type=integers, default=[0, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench_prefill.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        measure(1, 1, dtype, 1)  # kernels are compiled, types are tried out
        for prefix in options.prefixes:
            found = measure(options.new_tokens, prefix, dtype, options.rounds)
            rows += found
            write_rows(options.out, rows)
            for row in found:
                print(
                    f"{dtype}, {row['new_tokens']} of {row['context']} tokens, {row['backend']:12}"
                    f"{row['ms_median']:9.1f} ms {row['gflops']:5.0f} GFLOP/s "
                    f"{row['vs_torch_native']:6.1f}x torch_native"
                )
    print(plot(rows, options.out.with_suffix(".png")))
    print(options.out)


if __name__ == "__main__":
    main()
