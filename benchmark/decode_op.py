"""Decode attention of one layer: PSA and its dense kernel against gather + SDPA.

    python -m benchmark.decode_op --lengths 2048,8192,32768

The peer does what SGLang's ``torch_native`` backend does for a decode step: gather the request's K
and V by slot, then ``scaled_dot_product_attention``. All variants run in turn in every round, on a
pool larger than the caches. Keys are random, with a given number of pages holding the mass, so PSA
finds real work to skip; what share it read is reported beside the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmark.common import plot_lines, save, spread
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape, make_scorer
from sgl_psa.wrapper import PSADecodeWrapper

LAYERS = 8
HOT_PAGES = 6


class Setting:
    """A pool of ``LAYERS`` layers for ``batch`` requests of ``length`` tokens, pages scattered."""

    def __init__(self, length: int, batch: int, q_heads: int, kv_heads: int, dim: int, page: int):
        rng = torch.Generator().manual_seed(0)
        pages = length // page
        total = batch * pages + 1
        self.length, self.batch, self.page = length, batch, page
        self.scale = dim**-0.5
        shape = (LAYERS, total * page, kv_heads, dim)
        self.k = torch.randn(shape, generator=rng).mul_(0.5).bfloat16()
        self.v = torch.randn(shape, generator=rng).bfloat16()
        self.q = torch.randn(LAYERS, batch, q_heads, dim, generator=rng).bfloat16()
        order = torch.randperm(total - 1, generator=rng) + 1
        slots = (order[:, None] * page + torch.arange(page)).view(batch, length)
        self.req_to_token = slots.int()
        self.rows = torch.arange(batch)
        self.seq_lens = torch.full((batch,), length, dtype=torch.int64)
        group = q_heads // kv_heads
        for row in range(batch):
            hot = torch.randint(pages, (HOT_PAGES,), generator=rng) * page
            for layer in range(LAYERS):
                for head in range(kv_heads):
                    heads = self.q[layer, row, head * group : (head + 1) * group].float()
                    for number, offset in enumerate(hot.tolist()):
                        target = heads[number % group]
                        key = target * (14.0 / self.scale) / (target @ target)
                        self.k[layer, slots[row, offset + 3], head] = key.bfloat16()


def peer(s: Setting) -> Callable[[], torch.Tensor]:
    """Gather and SDPA, as SGLang's torch_native backend."""

    def step() -> torch.Tensor:
        for layer in range(LAYERS):
            for row in range(s.batch):
                slots = s.req_to_token[row]
                k = s.k[layer][slots].movedim(0, 1)[None]
                v = s.v[layer][slots].movedim(0, 1)[None]
                out = torch.nn.functional.scaled_dot_product_attention(
                    s.q[layer, row][None, :, None], k, v, scale=s.scale, enable_gqa=True
                )
        return out

    return step


def ours(s: Setting, policy: str) -> tuple[Callable[[], torch.Tensor], PSADecodeWrapper]:
    """The wrapper under ``policy``, default knobs, sparse at every length."""
    config = PSAConfig(policy=policy, min_context=0)
    backend = resolve_backend("auto", "cpu")
    kv_heads, dim = s.k.shape[2:]
    shape = CacheShape(LAYERS, s.k.shape[1] // s.page, s.page, kv_heads, dim, torch.device("cpu"))
    scorer = make_scorer(config, shape, backend)
    for row in range(s.batch):
        for layer in range(LAYERS):
            scorer.on_write(layer, s.req_to_token[row].long(), s.k[layer])
    wrapper = PSADecodeWrapper(config, scorer, backend=backend, kv_element_bytes=2)
    table = RuleTable(config, s.batch, "cpu")
    for row in range(s.batch):
        table.set(row, RequestRule.default(config))

    def step() -> torch.Tensor:
        wrapper.plan(s.req_to_token, s.rows, s.seq_lens, table.rows(s.rows))
        for layer in range(LAYERS):
            out, _ = wrapper.run(layer, s.q[layer], s.k[layer], s.v[layer], s.scale)
        return out

    return step, wrapper


def measure(s: Setting, rounds: int) -> dict[str, Any]:
    """Milliseconds a layer of each variant, interleaved, and what PSA read."""
    sparse, wrapper = ours(s, "psa")
    exact, _ = ours(s, "dense")
    variants = {"torch_native": peer(s), "dense": exact, "psa": sparse}
    outputs = {name: step() for name, step in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            begin = time.process_time()
            step()
            times[name].append((time.process_time() - begin) * 1e3 / LAYERS)
    wrapper.finish()
    report: dict[str, Any] = {name: spread(samples) for name, samples in times.items()}
    base = report["torch_native"]["median"]
    report["speedup_over_torch_native"] = {
        name: base / report[name]["median"] for name in ("dense", "psa")
    }
    report["bytes_fraction"] = wrapper.stats.total().as_dict()["bytes_fraction"]
    exact_out = outputs["dense"].float()
    report["psa_relative_error"] = float(
        (outputs["psa"].float() - exact_out).norm() / exact_out.norm()
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for batch in map(int, options.batches.split(",")):
        for length in map(int, options.lengths.split(",")):
            setting = Setting(length, batch, 32, 8, 128, options.page_size)
            row = {"length": length, "batch": batch, **measure(setting, options.rounds)}
            results.append(row)
            print(
                f"batch {batch} length {length}: torch_native {row['torch_native']['median']:.2f} "
                f"dense {row['dense']['median']:.2f} psa {row['psa']['median']:.2f} ms a layer, "
                f"psa read {row['bytes_fraction']:.1%}",
                flush=True,
            )
    path = save(
        "decode_op",
        {
            "what": "CPU time a layer in ms; bf16, 32 query and 8 KV heads of 128",
            "page_size": options.page_size,
            "results": results,
        },
    )
    series = {
        name: [(r["length"], r[name]["median"]) for r in results if r["batch"] == 1]
        for name in ("torch_native", "dense", "psa")
    }
    plot_lines("decode_op", series, "context (tokens)", "ms a layer, batch 1")
    print(path)


if __name__ == "__main__":
    main()
