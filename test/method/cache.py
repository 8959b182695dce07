"""A small paged KV cache with scattered pages, poisoned where nothing was written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape, Scorer
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper

PAGE = 16


@dataclass
class Cache:
    """Keys and values of one layer [slots, Hkv, D] and the pages of each request."""

    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def num_pages(self) -> int:
        return self.k.shape[0] // PAGE

    def tokens(self, row: int) -> torch.Tensor:
        return self.req_to_token[row, : int(self.seq_lens[row])].long()


def make_cache(lengths: list[int], kv_heads: int, dim: int, seed: int, sharp: float = 1.0) -> Cache:
    """Random keys in pages placed at random; slots that no token uses hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    pages = [-(-n // PAGE) for n in lengths]
    total = sum(pages) + 3
    order = (torch.randperm(total - 1, generator=rng) + 1).tolist()
    k = torch.full((total * PAGE, kv_heads, dim), float("nan"))
    v = k.clone()
    req_to_token = torch.full((len(lengths), max(pages) * PAGE), 2**31 - 1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        mine = [order.pop() for _ in range(pages[row])]
        slots = torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in mine])[:length]
        req_to_token[row, :length] = slots.int()
        k[slots] = sharp * torch.randn(length, kv_heads, dim, generator=rng)
        v[slots] = torch.randn(length, kv_heads, dim, generator=rng)
    return Cache(k, v, req_to_token, torch.tensor(lengths))


def dense(cache: Cache, q: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention in float64: the yardstick."""
    group = q.shape[1] // cache.k.shape[1]
    rows = []
    for row in range(q.shape[0]):
        slots = cache.tokens(row)
        k = cache.k[slots].double().repeat_interleave(group, 1)
        v = cache.v[slots].double().repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[row].double(), k) * scale, -1)
        rows.append(torch.einsum("hn,nhd->hd", weights, v))
    return torch.stack(rows)


def make_wrapper(cache: Cache, config: PSAConfig, backend: str) -> tuple[PSADecodeWrapper, Scorer]:
    """A wrapper over one layer whose summaries describe ``cache``."""
    shape = CacheShape(1, cache.num_pages, PAGE, *cache.k.shape[1:], torch.device("cpu"))
    summaries = make_summaries(config, shape, backend, norms=True)
    for row in range(len(cache.seq_lens)):
        summaries.on_write(0, cache.tokens(row), cache.k, cache.v)
    wrapper = PSADecodeWrapper(
        config, summaries.scorer, backend=backend, kv_element_bytes=4, values=summaries.values
    )
    return wrapper, summaries.scorer


def decode(
    wrapper: PSADecodeWrapper,
    cache: Cache,
    q: torch.Tensor,
    scale: float,
    params: list[dict] | None = None,
):
    """One planned step in layer 0: (out, StepStats)."""
    table = RuleTable(wrapper.config, len(cache.seq_lens), "cpu")
    for slot, request in enumerate(params or []):
        table.set(slot, RequestRule.parse(request, wrapper.config))
    slots = torch.arange(len(cache.seq_lens))
    wrapper.plan(cache.req_to_token, slots, cache.seq_lens, table.rows(slots))
    out, _ = wrapper.run(0, q, cache.k, cache.v, scale)
    return out, wrapper.finish()
