"""Requests that are prefilled and then decode a few tokens, over one cache or two tiers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.memory.tiered_cache import TieredCache
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper


@dataclass(frozen=True)
class Setup:
    """Sizes of a model's KV in float32, prompts in tokens, decode steps, and the kernels; those of
    the scorer where they are others; the device."""

    layers: int
    page: int
    heads: int
    group: int
    dim: int
    lengths: tuple[int, ...]
    steps: int
    backend: str
    scoring: str = ""
    device: str = "cpu"

    @property
    def frame(self) -> int:
        """Bytes of a frame."""
        return 2 * self.heads * self.page * self.dim * 4

    @property
    def num_pages(self) -> int:
        return 1 + sum(-(-(n + self.steps) // self.page) for n in self.lengths)

    @property
    def all(self) -> int:
        """Frames for every page."""
        return self.layers * self.num_pages

    def config(self, frames: int, **settings) -> PSAConfig:
        return PSAConfig(
            **{"min_context": 0, "recent_pages": 1, "group_pages": 2, **settings},
            device_pool_bytes=frames * self.frame,
            host_pool_bytes=self.all * self.frame,
        )

    def build(self, settings: PSAConfig) -> TieredCache:
        return TieredCache.build(
            settings,
            num_layers=self.layers,
            page_size=self.page,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            dtype=torch.float32,
            backend=self.backend,
            device=self.device,
        )


class Requests:
    """Those of a setup, at pages in random order; the same ones whatever they are kept in."""

    def __init__(self, setup: Setup, settings: PSAConfig, tier: TieredCache | None) -> None:
        self.setup, page, device = setup, setup.page, torch.device(setup.device)
        shape = CacheShape(setup.layers, setup.num_pages, page, setup.heads, setup.dim, device)
        self.summaries = make_summaries(settings, shape, setup.scoring or setup.backend)
        self.tier = tier
        self.wrapper = PSADecodeWrapper(
            settings, self.summaries.scorer, backend=setup.backend, kv_element_bytes=4, tier=tier
        )
        self.rules = RuleTable(settings, len(setup.lengths), shape.device)
        slots = setup.num_pages * page
        self.k = torch.zeros(setup.layers, slots, setup.heads, setup.dim, device=device)
        self.v = torch.zeros_like(self.k)
        self.rng = torch.Generator().manual_seed(5)
        order = iter(1 + torch.randperm(setup.num_pages - 1, generator=self.rng))
        width = -(-(max(setup.lengths) + setup.steps) // page) * page
        self.req_to_token = torch.zeros(len(setup.lengths), width, dtype=torch.int32)
        for row, length in enumerate(setup.lengths):
            for start in range(0, length + setup.steps, page):
                slots = next(order) * page + torch.arange(page)
                self.req_to_token[row, start : start + page] = slots.int()
        self.req_to_token = self.req_to_token.to(device)

    def pages(self, row: int, tokens: int) -> torch.Tensor:
        return self.req_to_token[row, : tokens : self.setup.page].long() // self.setup.page

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.rng).to(self.setup.device)

    def write(self, layer: int, slots: torch.Tensor) -> None:
        size = (len(slots), self.setup.heads, self.setup.dim)
        k, v = 1.5 * self.normal(*size), self.normal(*size)
        self.k[layer][slots], self.v[layer][slots] = k, v
        self.summaries.on_write(layer, slots, self.k[layer], self.v[layer])
        if self.tier is not None:
            self.tier.write(layer, slots, k, v)

    def prefill(self) -> None:
        for row, length in enumerate(self.setup.lengths):
            for layer in range(self.setup.layers):
                self.write(layer, self.req_to_token[row, :length].long())

    def step(self, done: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        setup, device = self.setup, self.setup.device
        rows = torch.arange(len(setup.lengths), device=device)
        lens = torch.tensor(setup.lengths, device=device) + done + 1
        self.wrapper.plan(self.req_to_token, rows, lens, self.rules.rows(rows))
        results = []
        for layer in range(setup.layers):
            self.write(layer, self.req_to_token[rows, lens - 1].long())
            q = self.normal(len(rows), setup.heads * setup.group, setup.dim)
            caches = (None, None) if self.tier is not None else (self.k[layer], self.v[layer])
            results.append(self.wrapper.run(layer, q, *caches, 0.2))
        return results

    def steps(self) -> list[torch.Tensor]:
        """Output and log-sum-exp of every layer and step."""
        steps = range(self.setup.steps)
        results = [tensor for done in steps for pair in self.step(done) for tensor in pair]
        self.wrapper.finish()
        return results
