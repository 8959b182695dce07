"""Scoring pages by key sketches: time a layer, and bytes a second against the machine's.

    python -m benchmark.sketch_score --lengths 4096,16384,65536

One layer of a decode step of 32 query and 8 KV heads of 128, made-up keys, pages scattered over a
pool of several layers. Beside the scorers: our dense decode op on the same pool, and how fast one
sum streams a buffer larger than the caches. CPU time of the process, all variants in turn in every
round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from sgl_psa_kernels.progressive_decode import progressive_decode

from benchmark.common import save, spread
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig, ScorerName
from sgl_psa.scorers import CacheShape, Scorer, make_scorer
from sgl_psa.scorers.base import PageBatch

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
STREAM_MIB = 512
VARIANTS = (
    ("sketch", 1),
    ("sketch", 2),
    ("sketch", 4),
    ("rotated_sketch", 1),
    ("rotated_sketch", 2),
    ("rotated_sketch", 4),
    ("two_level", 2),
)


class Setting:
    """Pools of ``layers`` layers for ``batch`` requests of ``length`` tokens."""

    def __init__(self, length: int, batch: int, page: int, layers: int) -> None:
        rng = torch.Generator().manual_seed(0)
        pages = length // page
        total = batch * pages + 1
        self.layers, self.page = layers, page
        self.scale = DIM**-0.5
        shape = (layers, total * page, KV_HEADS, DIM)
        one = torch.randn(shape[1:], generator=rng).mul_(0.5).bfloat16()
        self.k = one.expand(shape).contiguous()
        self.v = self.k.flip(1)
        self.q = torch.randn(layers, batch, Q_HEADS, DIM, generator=rng).bfloat16()
        table = (torch.randperm(total - 1, generator=rng) + 1).view(batch, pages)
        self.slots = (table[..., None] * page + torch.arange(page)).flatten()
        self.batch = PageBatch(
            table.int(),
            torch.full((batch,), length, dtype=torch.int32),
            torch.ones(batch, dtype=torch.uint8),
        )
        self.shape = CacheShape(layers, total, page, KV_HEADS, DIM, torch.device("cpu"))

    def scorer(self, name: str, bits: int, backend: str) -> Scorer:
        """A scorer of all keys; every layer holds the same ones."""
        config = PSAConfig(scorer=cast(ScorerName, name), sketch_bits=bits)
        scorer = make_scorer(config, self.shape, backend)
        scorer.on_write(0, self.slots, self.k[0])
        for state in (*scorer.state_tensors(), scorer.watermark):
            state[1:] = state[0]
        return scorer

    def dense(self, backend: str) -> Callable[[int], object]:
        """Our dense decode op."""
        rows = len(self.batch.seq_lens)
        zero = torch.zeros(rows)

        def step(layer: int) -> object:
            return progressive_decode(
                self.q[layer],
                self.k[layer],
                self.v[layer],
                self.batch.page_table,
                self.batch.seq_lens,
                None,
                torch.zeros(rows, dtype=torch.int32),
                zero,
                zero,
                zero,
                page_size=self.page,
                sm_scale=self.scale,
                sink_pages=1,
                recent_pages=1,
                group_pages=4,
                backend=backend,
            )

        return step


def stream(buffer: torch.Tensor) -> float:
    """GB/s of one sum over ``buffer``."""
    begin = time.process_time()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (time.process_time() - begin) / 1e9


def read_bytes(scorer: Scorer, s: Setting) -> float:
    """Bytes of sketches that the newest ``score`` of layer 0 read."""
    read = scorer.read_bytes(0)
    if read is not None:
        return float(read.sum())
    pages = s.batch.page_table.numel()
    return float(pages * KV_HEADS * scorer.bytes_per_page)


def measure(s: Setting, buffer: torch.Tensor, backend: str, rounds: int) -> dict[str, Any]:
    """Milliseconds a layer of each variant and of the dense op, GB/s of sketches and of a sum."""
    scorers = {f"{name}:{bits}": s.scorer(name, bits, backend) for name, bits in VARIANTS}
    steps: dict[str, Callable[[int], object]] = {"dense": s.dense(backend)}
    for name, scorer in scorers.items():
        steps[name] = lambda layer, scorer=scorer: scorer.score(layer, s.q[layer], s.batch, s.scale)
    times: dict[str, list[float]] = {name: [] for name in steps}
    streamed = []
    for _ in range(rounds):
        streamed.append(stream(buffer))
        for name, step in steps.items():
            begin = time.process_time()
            for layer in range(s.layers):
                step(layer)
            times[name].append((time.process_time() - begin) * 1e3 / s.layers)
    report: dict[str, Any] = {"stream_gb_per_s": spread(streamed)}
    for name, samples in times.items():
        entry = {"ms": spread(samples)}
        if name in scorers:
            entry["gb_per_s"] = read_bytes(scorers[name], s) / entry["ms"]["median"] / 1e6
        report[name] = entry
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,16384,65536")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--most-tokens", type=int, default=131072, help="of a batch; more: left out"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = resolve_backend("auto", "cpu")
    buffer = torch.ones(STREAM_MIB << 18)
    results = []
    for batch in map(int, options.batches.split(",")):
        for length in map(int, options.lengths.split(",")):
            if batch * length > options.most_tokens:
                continue
            setting = Setting(length, batch, options.page_size, options.layers)
            row = measure(setting, buffer, backend, options.rounds)
            results.append({"length": length, "batch": batch, **row})
            print(
                f"batch {batch} length {length}, stream {row['stream_gb_per_s']['median']:.1f} GB/s"
            )
            for name in ("dense", *(f"{name}:{bits}" for name, bits in VARIANTS)):
                speed = f"{row[name]['gb_per_s']:6.1f} GB/s" if name != "dense" else ""
                print(f"  {name:17} {row[name]['ms']['median']:8.3f} ms {speed}", flush=True)
    path = save(
        "sketch_score",
        {
            "what": "CPU time a layer; 32 query and 8 KV heads of 128; name:bits",
            "page_size": options.page_size,
            "results": results,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
