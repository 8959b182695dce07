"""The page tier on a GPU: the link, decode at several hit rates, and copies beside attention.

    python -m benchmark.gpu.memory_op
    TRITON_INTERPRET=1 python -m benchmark.gpu.memory_op --device cpu --tiny --rounds 1 --steps 2
        # without a GPU: it runs; its times mean nothing

``link``: bytes per second of the kernel that brings scattered records to frames, and of writes
through to the host, against one large cudaMemcpy each way and one cudaMemcpy a record.
``decode``: a layer with a share of its pages in frames, the rest read on the host, against the same
attention on a resident pool; dense, and by the marginal rule with few hot pages. Both of records in
the dtype of the pages and in int8.
``steps``: all layers, a working set that drifts, an arena of a quarter of the pages; copies on a
side stream (pipelined) against a host that waits for every step (stop-and-go), and resident.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sgl_psa_kernels.page_tier import HostStore, TierShape, TritonTier, triton_places
from sgl_psa_kernels.progressive_decode import progressive_decode

from benchmark.common import hardware, spread
from benchmark.gpu.decode_op import Timer

HIT_RATES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5)
GROUP = 4
DELTA_LOG = -2.3


def make_tier(shape: TierShape, pipeline: bool = True) -> TritonTier:
    return TritonTier(shape, HostStore.memory(shape.host_bytes), pipeline)


def fill(tier: TritonTier) -> torch.Tensor:
    """Random tokens in all pages; returns what these hold, [2, L, slots, Hkv, D] on the device."""
    shape, device = tier.shape, tier.k_frames.device
    slots = torch.arange(shape.num_pages * shape.page_size, device=device)
    size = (2, shape.num_layers, len(slots), shape.num_kv_heads, shape.head_dim)
    kv = torch.empty(size, dtype=shape.dtype, device=device).normal_()
    for layer in range(shape.num_layers):
        for part in slots.split(8192):
            tier.write(layer, part, kv[0, layer, part], kv[1, layer, part])
        if shape.int8_host:
            tier.gather(layer, torch.arange(shape.num_pages), len(slots), *kv[:, layer])
    return kv


def link(shape: TierShape, timer: Timer, rounds: int) -> dict[str, Any]:
    """Seconds of moving the same bytes by every way."""
    tier = make_tier(shape._replace(num_layers=1))
    kv = fill(tier)
    device, size = kv.device, shape.record_bytes
    count = min(tier.shape.num_frames, tier.shape.num_pages)
    pages, frames = torch.randperm(tier.shape.num_pages)[:count], torch.arange(count)
    pinned = torch.empty(count * size, dtype=torch.uint8, pin_memory=timer.cuda)
    there = torch.empty(count * size, dtype=torch.uint8, device=device)
    slots = torch.arange(count * shape.page_size, device=device)
    rows = kv[:, 0, slots]

    def one_by_one() -> None:
        for at in range(0, count * size, size):
            there[at : at + size].copy_(pinned[at : at + size], non_blocking=True)

    ways: dict[str, Callable[[], Any]] = {
        "cudaMemcpy to the device": lambda: there.copy_(pinned, non_blocking=True),
        "cudaMemcpy a record": one_by_one,
        "cudaMemcpy to the host": lambda: pinned.copy_(there, non_blocking=True),
        "write through": lambda: tier.write(0, slots, rows[0], rows[1]),
    }
    programs = triton_places.COPY_PROGRAMS
    for number in (16, 32, 64, 128, 256):
        ways[f"bring, {number} programs"] = lambda n=number: bring(tier, pages, frames, n)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            seconds = timer(way) * 1e-3
            if turn >= 2:
                times[name].append(seconds)
    triton_places.COPY_PROGRAMS = programs
    tier.close()
    return {
        "host_dtype": host_name(shape),
        "records": count,
        "record_bytes": size,
        "bytes_per_second": {
            name: count * size / spread(samples)["median"] for name, samples in times.items()
        },
    }


def host_name(shape: TierShape) -> str:
    return str(shape.host_dtype or shape.dtype).removeprefix("torch.")


def bring(tier: TritonTier, pages: torch.Tensor, frames: torch.Tensor, programs: int) -> None:
    """The copy alone; the tables do not learn of it."""
    triton_places.COPY_PROGRAMS = programs
    tier.places.copy(pages, frames)


def arguments(shape: TierShape, batch: int, hot: float, device: torch.device) -> dict[str, Any]:
    """Decode of ``batch`` rows that share out the pages; ``hot`` pages are worth attending."""
    each = shape.num_pages // batch
    table = torch.randperm(shape.num_pages)[: batch * each].view(batch, each).int().to(device)
    heads = 4 * shape.num_kv_heads
    mass = torch.where(torch.rand(batch, shape.num_kv_heads, each) < hot, 8.0, -8.0)
    mass = mass + 0.1 * torch.rand_like(mass)
    options = {"dtype": torch.float32, "device": device}
    return {
        "q": torch.randn(batch, heads, shape.head_dim, device=device).to(shape.dtype),
        "page_table": table,
        "seq_lens": torch.full((batch,), each * shape.page_size, device=device).int(),
        "log_mass": mass.repeat_interleave(4, 1).to(device).contiguous(),
        "mode": torch.ones(batch, dtype=torch.int32, device=device),
        "threshold": torch.full((batch,), DELTA_LOG, **options),
        "kappa_floor": torch.zeros(batch, **options),
        "kappa_std": torch.zeros(batch, **options),
        "sm_scale": shape.head_dim**-0.5,
        "sink_pages": 1,
        "recent_pages": 2,
        "group_pages": GROUP,
    }


def decode(
    shape: TierShape, timer: Timer, rounds: int, batch: int, rates: tuple[float, ...] = HIT_RATES
) -> list[dict[str, Any]]:
    """A layer at several hit rates; no step begins, so no page moves."""
    tier = make_tier(shape._replace(num_layers=1, num_frames=shape.num_pages + 1))
    tier.set_open_pages(1)
    kv, rows = fill(tier), []
    for name, hot in (("dense", 1.0), ("marginal", 0.05)):
        given = arguments(shape, batch, hot, kv.device)
        if name == "dense":
            given |= {"log_mass": None, "mode": torch.zeros_like(given["mode"])}
        resident = {"k_cache": kv[0, 0], "v_cache": kv[1, 0], "page_size": shape.page_size}
        plain = {"backend": "triton", **given, **resident}
        steps = {"resident": lambda p=plain: progressive_decode(**p)}
        tiered = lambda g=given: tier.decode(0, 1, **g)  # noqa: E731
        for rate in rates:
            tier.evict()
            held = torch.randperm(shape.num_pages)[: int(rate * shape.num_pages)]
            tier.prefetch(0, held)
            times: dict[str, list[float]] = {"resident": [], "tier": []}
            for turn in range(rounds + 2):
                for way, step in (*steps.items(), ("tier", tiered)):
                    seconds = timer(step)
                    if turn >= 2:
                        times[way].append(seconds)
            exact = all(map(torch.equal, tiered(), steps["resident"]()))
            rows.append(
                {
                    "host_dtype": host_name(shape),
                    "rule": name,
                    "batch": batch,
                    "hit_rate": rate,
                    "equal_to_resident": exact,
                    "ms": {way: spread(samples) for way, samples in times.items()},
                }
            )
            print(rows[-1], flush=True)
    tier.close()
    return rows


def drifting(shape: TierShape, steps: int, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Estimates of each step: a tenth of the pages is hot, a tenth of those changes every step."""
    each = shape.num_pages // batch
    hot = torch.rand(batch, shape.num_kv_heads, each) < 0.1
    masses = []
    for _ in range(steps):
        moved = torch.rand(hot.shape) < 0.1
        hot = torch.where(moved, torch.rand(hot.shape) < 0.1, hot)
        mass = torch.where(hot, 8.0, -8.0) + 0.1 * torch.rand(hot.shape)
        masses.append(mass.repeat_interleave(4, 1).to(device).contiguous())
    return masses


def run_steps(shape: TierShape, batch: int, count: int, cuda: bool) -> dict[str, Any]:
    """Milliseconds a step and what moved, for each way."""
    torch.manual_seed(0)
    quarter = shape._replace(
        num_frames=max(shape.minimum_frames, shape.num_layers * shape.num_pages // 4)
    )
    results: dict[str, Any] = {}
    for name in ("resident", "pipelined", "stop-and-go"):
        tier = make_tier(quarter, name == "pipelined")
        kv = fill(tier)
        given = arguments(shape, batch, 0.1, kv.device)
        masses = drifting(shape, count, batch, kv.device)
        times = []
        for step, mass in enumerate(masses, 1):
            begin = time.perf_counter()
            for layer in range(shape.num_layers):
                given["log_mass"] = mass.roll(layer, 2)
                if name == "resident":
                    caches = {"k_cache": kv[0, layer], "v_cache": kv[1, layer]}
                    size = {"page_size": shape.page_size, "backend": "triton"}
                    progressive_decode(**given, **caches, **size)
                else:
                    tier.decode(layer, step, **given)
            # A server reads its tokens here.
            if cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        tier.drain()
        counters = tier.counters()
        page_bytes = shape.record_bytes // shape.num_kv_heads
        reads = counters.hits + counters.bytes_read_through // page_bytes
        results[name] = {
            "step_ms": spread(times[len(times) // 4 :]),
            "hit_rate": counters.hits / max(reads, 1),
            **counters._asdict(),
        }
        tier.close()
        print(name, results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_memory.json"))
    options = parser.parse_args()
    timer, cuda = Timer(options.device), options.device == "cuda"
    report: dict[str, Any] = {"hardware": hardware(), "link": [], "decode": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    for page in (16,) if options.tiny else (16, 64):
        pages = 9 if options.tiny else 131072 // page
        shape = TierShape(2, pages, pages, page, 8, 128, torch.bfloat16)
        if options.tiny:
            shape = TierShape(2, pages, 8, page, 1, 16, torch.float16)
        for held in (shape, shape._replace(host_dtype=torch.int8)):
            report["link"].append(link(held, timer, options.rounds))
            print(report["link"][-1], flush=True)
            for batch in (1,) if options.tiny else (1, 8):
                rates = HIT_RATES[-1:] if options.tiny else HIT_RATES
                report["decode"] += decode(held, timer, options.rounds, batch, rates)
            save()
    layers = shape._replace(num_layers=2 if options.tiny else 8)
    report["steps"] = run_steps(layers, 1 if options.tiny else 8, options.steps, cuda)
    save()
    print(options.out)


if __name__ == "__main__":
    main()
