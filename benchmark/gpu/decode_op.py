"""Decode attention of one layer on a GPU: time, and bytes over time against copy bandwidth.

    python -m benchmark.gpu.decode_op --lengths 8192,65536,131072 --batches 1,8,64
    TRITON_INTERPRET=1 python -m benchmark.gpu.decode_op --device cpu --lengths 64 --batches 1 \
        --rounds 1         # without a GPU: it runs; its times mean nothing

Most of the mass is in a few keys, or in keys of a share of the pages (``--hot-shares``), as many as
the rule then reads. Ours: 2-bit sketches, marginal rule, in groups that grow as the server's do,
otherwise and not at all, with and without a predicted first group, and dense, in Triton; with lists
of pages by FlashInfer; and in batched torch. Peers in the same run, where installed: FlashInfer's
paged decode, FlashAttention 3, the kernel of SGLang's Triton backend, and torch's SDPA on a
contiguous copy of the cache. Variants run in turn in every round, the L2 cache is overwritten
before each, CUDA events time them, medians are kept. What can be captured runs as a CUDA graph; the
torch backend cannot.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sgl_psa_kernels.progressive_decode import STAT_NAMES, progressive_decode

from benchmark.common import hardware, spread
from benchmark.gpu import plot
from benchmark.gpu.peers import PEERS, Step
from benchmark.gpu.pool import Pool, Sketch, heat, make_pool, make_sketch, score
from sgl_psa.groups import GROWTH

HEADS, KV_HEADS, DIM = 32, 8, 128
DELTA = 0.1
#: Least number of hot pages, which DELTA reads; of more of them each has less of the mass.
HOT_PAGES = 6
FLUSH_BYTES = 1 << 28
#: Largest relative error of a dense peer in 16 bits.
PEER_ERROR = 0.02


class Timer:
    """Milliseconds of steps, each behind a flush of the cache."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flushed = torch.empty(FLUSH_BYTES if self.cuda else 1, device=device).byte()

    def __call__(self, step: Step) -> float:
        self.flushed.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            step()
            return (time.perf_counter() - begin) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def captured(self, step: Step) -> Step:
        """``step`` as a CUDA graph, warmed up."""
        for _ in range(3):
            step()
        if not self.cuda:
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def copy_bandwidth(timer: Timer, rounds: int) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    elements = 1 << 30 if timer.cuda else 1 << 20
    a = torch.empty(elements, dtype=torch.uint8, device=timer.flushed.device)
    b = torch.empty_like(a)
    times = [timer(lambda: b.copy_(a)) for _ in range(rounds + 2)][2:]
    return 2 * elements / (spread(times)["median"] * 1e-3)


def decode(
    pool: Pool,
    log_mass: torch.Tensor | None,
    backend: str,
    first: torch.Tensor | None = None,
    group: int = 4,
    percent: int | None = None,
    delta: float = DELTA,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Marginal rule, or dense without estimates; ``percent``: by default the server's."""
    options = {"dtype": torch.float32, "device": pool.q.device}
    size = (pool.batch,)
    return progressive_decode(
        pool.q,
        pool.k,
        pool.v,
        pool.page_table,
        pool.seq_lens,
        log_mass,
        torch.full(size, int(log_mass is not None), dtype=torch.int32, device=pool.q.device),
        torch.full(size, math.log(delta), **options),
        torch.zeros(size, **options),
        torch.zeros(size, **options),
        page_size=pool.page,
        sm_scale=pool.scale,
        sink_pages=1,
        recent_pages=2,
        group_pages=group,
        group_percent=GROWTH[backend] if percent is None else percent,
        backend=backend,
        first_pages=first,
    )


def variants(
    pool: Pool,
    sketch: Sketch,
    timer: Timer,
    first: torch.Tensor,
    exact: torch.Tensor,
    delta: float,
) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by name, and why others are missing. A peer that cannot run, or whose output is not
    that of dense attention, hides no other one."""

    def scores(backend: str) -> torch.Tensor:
        return score(pool, sketch, backend)

    def psa(lists: str = "triton", scorer: str = "triton", **options: Any) -> Step:
        return lambda: decode(pool, scores(scorer), lists, delta=delta, **options)

    def dense_peer(peer: Callable[[Pool], Step]) -> Step:
        step = peer(pool)
        error = float((step().float() - exact).norm() / exact.norm())
        if not error < PEER_ERROR:
            raise ValueError(f"relative error {error:.2g}")
        return timer.captured(step)

    builders: dict[str, Callable[[], Step]] = {
        **{
            name: lambda peer=peer: dense_peer(peer)  # type: ignore[misc]
            for name, peer in PEERS.items()
        },
        "triton dense": lambda: timer.captured(lambda: decode(pool, None, "triton")),
        "triton score": lambda: timer.captured(lambda: scores("triton")),
        "triton psa": lambda: timer.captured(psa()),
        "triton psa, growing by 50 %": lambda: timer.captured(psa(percent=50)),
        "triton psa, growing by 200 %": lambda: timer.captured(psa(percent=200)),
        "triton psa, groups of 4": lambda: timer.captured(psa(percent=0)),
        "triton psa, groups of 16": lambda: timer.captured(psa(percent=0, group=16)),
        "triton psa, predicted": lambda: timer.captured(psa(first=first)),
        "flashinfer dense, in rows": lambda: timer.captured(
            lambda: decode(pool, None, "flashinfer")
        ),
        "flashinfer psa": lambda: timer.captured(psa("flashinfer")),
        "flashinfer psa, predicted": lambda: timer.captured(psa("flashinfer", first=first)),
        "torch psa, no graph": lambda: psa("torch", "torch", percent=GROWTH["triton"]),
    }
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, build in builders.items():
        try:
            step = build()
            step()
            steps[name] = step
        except Exception as error:
            text = " ".join(str(error).split())
            missing[name] = f"{type(error).__name__}: {text[:200]}"
    return steps, missing


def measure(
    length: int, batch: int, page: int, share: float, rounds: int, timer: Timer, bandwidth: float
) -> dict[str, Any]:
    device = "cuda" if timer.cuda else "cpu"
    pool = make_pool(
        [length] * batch,
        page=page,
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        dtype=torch.bfloat16 if timer.cuda else torch.float16,
        device=device,
    )
    hot = max(HOT_PAGES, round(share * length / page))
    delta = DELTA * HOT_PAGES / hot
    heat(pool, hot)
    sketch = make_sketch(pool, "triton" if timer.cuda else "reference")
    exact = decode(pool, None, "triton")[0].float()
    out, _, stats = decode(pool, score(pool, sketch, "triton"), "triton", delta=delta)
    columns = {name: stats[..., i] for i, name in enumerate(STAT_NAMES)}
    token = 2 * DIM * pool.k.element_size()
    dense_bytes = batch * KV_HEADS * length * token
    scored = batch * KV_HEADS * length * (DIM * sketch.bits // 8 + 4)
    read = int(columns["tokens_attended"].sum()) * token
    # The prediction of a step that is like the one before.
    first = columns["pages_attended"].to(torch.int32)
    steps, missing = variants(pool, sketch, timer, first, exact, delta)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timer(step))
    row: dict[str, Any] = {
        "length": length,
        "batch": batch,
        "page_size": page,
        "hot_share": share,
        "pages_fraction": float(columns["pages_attended"].mean()) / math.ceil(length / page),
        "bytes_fraction": (scored + read) / dense_bytes,
        "rounds_mean": float(columns["rounds"].mean()),
        "relative_error": float((out.float() - exact).norm() / exact.norm()),
        "missing": missing,
        "variants": {},
    }
    for name, samples in times.items():
        moved = scored + read if "psa" in name else scored if "score" in name else dense_bytes
        seconds = spread(samples)["median"] * 1e-3
        row["variants"][name] = {
            "ms": spread(samples),
            "bytes": moved,
            "bytes_per_second": moved / seconds,
            "of_copy_bandwidth": moved / seconds / bandwidth,
        }
    return row


def table(row: dict[str, Any]) -> str:
    lines = [
        f"batch {row['batch']}, {row['length']} tokens, pages of {row['page_size']}: PSA reads "
        f"{row['pages_fraction']:.1%} of the pages, {row['bytes_fraction']:.1%} of the bytes, "
        f"relative error {row['relative_error']:.1e}, "
        f"{row['rounds_mean']:.1f} rounds"
    ]
    for name, result in row["variants"].items():
        lines.append(
            f"  {name:24} {result['ms']['median']:9.4f} ms "
            f"{result['bytes_per_second'] / 1e9:8.0f} GB/s {result['of_copy_bandwidth']:7.1%}"
        )
    lines += [f"  {name:24} {reason}" for name, reason in row["missing"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--lengths", default="8192,65536,131072")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--page-sizes", default="16,64")
    parser.add_argument("--hot-shares", default="0,0.1", help="of pages with most of the mass")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-gib", type=float, default=24.0, help="largest K and V to try")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_decode_op.json"))
    options = parser.parse_args()
    timer = Timer(options.device)
    bandwidth = copy_bandwidth(timer, options.rounds)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {"hardware": hardware(), "copy_bytes_per_second": bandwidth}
    for page in map(int, options.page_sizes.split(",")):
        for length in map(int, options.lengths.split(",")):
            for batch in map(int, options.batches.split(",")):
                gib = batch * length * KV_HEADS * DIM * 4 / 2**30
                if gib > options.max_gib:
                    print(f"batch {batch}, {length} tokens: {gib:.0f} GiB, left out", flush=True)
                    continue
                for share in map(float, options.hot_shares.split(",")):
                    results.append(
                        measure(length, batch, page, share, options.rounds, timer, bandwidth)
                    )
                    print(table(results[-1]), flush=True)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    report["results"] = results
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(options.out)
    if results:
        print(plot.picture(report, options.out))


if __name__ == "__main__":
    main()
