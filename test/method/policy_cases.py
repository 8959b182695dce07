"""Caches whose values name their pages, so that the output shows which pages were read."""

from __future__ import annotations

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.stats import StepStats
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper
from test.method.cache import PAGE, Cache, make_cache

KV_HEADS, GROUP, DIM = 2, 3, 64
SCALE = DIM**-0.5


def named_pages(lengths: list[int], seed: int, kv_heads: int = KV_HEADS) -> Cache:
    """Random keys; the value of a token is 1 in the component of its logical page, else 0."""
    cache = make_cache(lengths, kv_heads, DIM, seed)
    for row, length in enumerate(lengths):
        assert length <= DIM * PAGE
        slots = cache.tokens(row)
        cache.v[slots] = 0.0
        cache.v[slots, :, torch.arange(length) // PAGE] = 1.0
    return cache


def queries(rows: int, seed: int = 7, heads: int = KV_HEADS * GROUP) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, heads, DIM, generator=rng)


def true_log_mass(cache: Cache, q: torch.Tensor, row: int) -> torch.Tensor:
    """float64 [Hkv, G, pages] of one row."""
    slots = cache.tokens(row)
    heads = cache.k.shape[1]
    x = q[row].double().view(heads, -1, q.shape[-1]) * SCALE
    logits = torch.einsum("hgd,nhd->hgn", x, cache.k[slots].double())
    return torch.stack([part.logsumexp(-1) for part in logits.split(PAGE, -1)], -1)


def pages_read(cache: Cache, out: torch.Tensor, row: int) -> torch.Tensor:
    """bool [Hkv, pages]: from the output over named pages."""
    heads, count = cache.k.shape[1], -(-int(cache.seq_lens[row]) // PAGE)
    seen = out[row].view(heads, -1, DIM)[..., :count] > 0
    assert bool((seen == seen[:, :1]).all()), "heads that share a KV head read different pages"
    return seen[:, 0]


def restricted(cache: Cache, q: torch.Tensor, row: int, read: torch.Tensor) -> torch.Tensor:
    """Attention in float64 over the pages ``read`` bool [Hkv, pages], float64 [Hq, DIM]."""
    mass = true_log_mass(cache, q, row).masked_fill(~read[:, None], -torch.inf)
    share = mass.softmax(-1).flatten(0, 1)
    return torch.nn.functional.pad(share, (0, DIM - share.shape[1]))


Step = tuple[torch.Tensor, StepStats]


class Run:
    """A wrapper over one layer of ``cache``; :meth:`step` decodes all its rows once."""

    def __init__(self, cache: Cache, config: PSAConfig, backend: str) -> None:
        self.cache, self.config = cache, config
        shape = CacheShape(1, cache.num_pages, PAGE, *cache.k.shape[1:], torch.device("cpu"))
        summaries = make_summaries(config, shape, backend, norms=True)
        self.scorer = summaries.scorer
        for row in range(len(cache.seq_lens)):
            summaries.on_write(0, cache.tokens(row), cache.k, cache.v)
        self.wrapper = PSADecodeWrapper(
            config, self.scorer, backend=backend, kv_element_bytes=4, values=summaries.values
        )
        self.table = RuleTable(config, len(cache.seq_lens), "cpu")

    def ask(self, row: int, params: dict) -> None:
        """Give the request in ``row`` its rule."""
        self.table.set(row, RequestRule.parse(params, self.config))

    def step(
        self, q: torch.Tensor, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, StepStats]:
        """Output and statistics of ``rows``, all by default."""
        slots = torch.arange(len(self.cache.seq_lens)) if rows is None else torch.tensor(rows)
        lens = self.cache.seq_lens[slots]
        self.wrapper.plan(self.cache.req_to_token, slots, lens, self.table.rows(slots))
        out, _ = self.wrapper.run(0, q[slots], self.cache.k, self.cache.v, SCALE)
        step = self.wrapper.finish()
        assert step is not None
        return out, step

    def estimates(self, q: torch.Tensor) -> torch.Tensor:
        """The scorer's log masses of all rows, [B, Hkv, G, max pages]."""
        slots = torch.arange(len(self.cache.seq_lens))
        plan = self.wrapper.plan(
            self.cache.req_to_token, slots, self.cache.seq_lens, self.table.rows(slots)
        )
        batch = plan.batch._replace(active=torch.ones_like(plan.batch.active))
        mass = self.scorer.score(0, q, batch, SCALE)
        self.wrapper.finish()
        return mass.unflatten(1, (self.cache.k.shape[1], -1))


def settings(policy: str, **changes) -> PSAConfig:
    """Small forced sets and no short-context shortcut."""
    base = dict(min_context=0, sink_pages=1, recent_pages=2, group_pages=2, budget_pages=9)
    return PSAConfig(**{"policy": policy, **base, **changes})
