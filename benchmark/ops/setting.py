"""The memory that all ops of one run share: KV pools of several layers, and one step's queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from sgl_psa_kernels._native import native_available

from benchmark.ops.keys import mixed
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.huge_pages import zero_in_huge_pages
from sgl_psa.kv_layout import zeros_heads_first
from sgl_psa.scorers import CacheShape, Scorer, make_scorer
from sgl_psa.scorers.base import PageBatch


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer, and the page size of its cache."""

    query: int = 32
    kv: int = 8
    dim: int = 128
    page: int = 16

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token, one KV head, bf16."""
        return 4 * self.dim


@dataclass
class Setting:
    """``batch`` requests of ``context`` tokens in every layer of a pool of ``pool_bytes`` or more.

    Every request and layer holds the same keys, each in memory of its own. The pool is allocated as
    the server's is.

    Attributes:
        heads_apart: the heads of a token do not lie side by side.
        in_order: a request's pages follow each other; otherwise they are scattered.
        q: bf16 [B, Hq, D]; k, v: one [slots, Hkv, D] a layer; slots: int64 [B, context].
    """

    context: int
    batch: int
    heads: Heads = field(default_factory=Heads)
    pool_bytes: int = 1_300_000_000
    min_layers: int = 2
    heads_apart: bool = True
    in_order: bool = False

    def __post_init__(self) -> None:
        heads, page = self.heads, self.heads.page
        rng = torch.Generator().manual_seed(0)
        keys, queries = mixed(
            self.context, kv_heads=heads.kv, group=heads.query // heads.kv, dim=heads.dim
        )
        values = torch.randn(keys.shape, generator=rng).bfloat16()
        self.q = queries.expand(self.batch, -1, -1).contiguous()
        self.layers = max(self.min_layers, -(-self.pool_bytes // self.layer_bytes))
        pages = self.context // page
        order = torch.randperm(self.batch * pages, generator=rng) + 1
        if self.in_order:
            order = order.sort().values
        self.page_table = order.view(self.batch, pages).int()
        self.slots = (self.page_table.long()[..., None] * page + torch.arange(page)).flatten(1)
        self.k = [self._pool(keys) for _ in range(self.layers)]
        self.v = [self._pool(values) for _ in range(self.layers)]
        self.seq_lens = torch.full((self.batch,), self.context, dtype=torch.int32)
        self.pages = PageBatch(
            self.page_table, self.seq_lens, torch.ones(self.batch, dtype=torch.uint8)
        )
        self.backend = resolve_backend("auto", "cpu")

    def _pool(self, rows: torch.Tensor) -> torch.Tensor:
        heads = self.heads
        slots = (self.page_table.numel() + 1) * heads.page
        if self.heads_apart:
            pool = zeros_heads_first(slots, heads.kv, heads.dim, rows.dtype, "cpu")
        else:
            pool = torch.empty(slots, heads.kv, heads.dim, dtype=rows.dtype)
            zero_in_huge_pages(pool)
        for row in self.slots:
            pool[row] = rows
        return pool

    @property
    def scale(self) -> float:
        return float(self.heads.dim**-0.5)

    @property
    def layer_bytes(self) -> int:
        """Bytes of K and V of one layer."""
        return self.batch * self.context * self.heads.kv * self.heads.token_bytes

    @property
    def isa(self) -> str:
        """Instruction set of our kernels."""
        return native_available()[1] if self.backend == "cpu" else torch_isa()

    @cached_property
    def shape(self) -> CacheShape:
        """Of the pool, for scorers."""
        heads = self.heads
        pages = self.page_table.numel() + 1
        return CacheShape(self.layers, pages, heads.page, heads.kv, heads.dim, torch.device("cpu"))

    def scorer(self, config: PSAConfig) -> Scorer:
        """The scorer of ``config`` with the state of all keys, in every layer."""
        scorer = make_scorer(config, self.shape, self.backend)
        scorer.on_write(0, self.slots.flatten(), self.k[0])
        for state in (*scorer.state_tensors(), scorer.watermark):
            state[1:] = state[0]
        return scorer


def torch_isa() -> str:
    """Instruction set of torch's own kernels."""
    return str(torch.backends.cpu.get_cpu_capability()).lower()
