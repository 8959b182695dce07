"""Runs the policies that choose pages outright, between scoring and the progressive loop.

Chosen pages keep a finite log mass and all others get -inf; the loop then attends every finite
page, and its forced pages besides. Batches without such policies cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sgl_psa.attention_sums import AttentionSums, page_weights
from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES, Candidates, Policy
from sgl_psa.policies.swa import local_pages
from sgl_psa.rule_table import Pick
from sgl_psa.scorers.base import CacheShape, PageBatch
from sgl_psa.stats import COVERAGE


class Selection(NamedTuple):
    """The rows of one policy in one decode step; the same for every layer.

    Attributes:
        rows: int64 [R], on the device.
        lengths: tokens of each row.
        pages: without ``log_mass`` and ``sums``, which are a layer's.
    """

    policy: Policy
    picks: tuple[Pick, ...]
    rows: torch.Tensor
    lengths: tuple[int, ...]
    pages: Candidates


class Choice(NamedTuple):
    """What a selection became in one layer.

    Attributes:
        attended: bool [R, Hkv, M], forced pages included.
        log_mass: float32 [R, Hkv, G, M] estimates of all pages, ``None`` if there are none.
    """

    selection: Selection
    attended: torch.Tensor
    log_mass: torch.Tensor | None


def estimated_coverage(
    lse: torch.Tensor, log_mass: torch.Tensor, left: torch.Tensor
) -> torch.Tensor:
    """Share of the mass that was attended, by the estimates of the rest: [R, Hkv].

    Args:
        lse: float32 [R, Hkv, G], of what was attended.
        log_mass: float32 [R, Hkv, G, M].
        left: bool [R, Hkv, M], pages left out.
    """
    rest = torch.logsumexp(log_mass.masked_fill(~left[:, :, None], -torch.inf), -1)
    return torch.sigmoid(lse - rest).amin(-1)


class Selector:
    """See the module; one a cache."""

    def __init__(self, config: PSAConfig, shape: CacheShape) -> None:
        self.config = config
        self.shape = shape
        self.sums = AttentionSums(shape.num_layers, shape.num_kv_heads, shape.device)

    def plan(
        self, picks: Sequence[Pick], sparse: torch.Tensor, batch: PageBatch
    ) -> tuple[Selection, ...]:
        """Group the rows of a step by policy; rows that are not ``sparse`` bool [B] drop out."""
        if not picks:
            return ()
        takes_part, lengths = sparse.tolist(), batch.seq_lens.tolist()
        by_policy: dict[str, list[Pick]] = {}
        for pick in picks:
            if takes_part[pick.row]:
                by_policy.setdefault(pick.rule.policy, []).append(pick)
        return tuple(
            self._selection(POLICIES[name], tuple(mine), lengths, batch)
            for name, mine in by_policy.items()
        )

    def _selection(
        self, policy: Policy, picks: tuple[Pick, ...], lengths: list[int], batch: PageBatch
    ) -> Selection:
        device = batch.seq_lens.device

        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None, None]

        mine = tuple(lengths[pick.row] for pick in picks)
        counts = [-(-length // self.shape.page_size) for length in mine]
        count = column(counts, torch.int64)
        page = torch.arange(batch.page_table.shape[1], device=device)
        exists = page < count
        recent = max(self.config.recent_pages, 1)
        ends = (page < self.config.sink_pages) | (page >= count - recent)
        fresh = None
        if policy.keeps_sums:
            fresh = self.sums.begin_step(picks, mine, counts)[:, None, None]
        pages = Candidates(
            log_mass=None,
            exists=exists,
            forced=(exists & ends).expand(-1, self.shape.num_kv_heads, -1),
            pages=count,
            budget=column([pick.rule.budget_pages for pick in picks], torch.int64),
            coverage=column([pick.rule.coverage for pick in picks], torch.float64),
            sink_pages=self.config.sink_pages,
            recent_pages=recent,
            fresh=fresh,
        )
        rows = torch.tensor([pick.row for pick in picks], device=device)
        return Selection(policy, picks, rows, mine, pages)

    def choose(
        self, layer: int, selections: Sequence[Selection], log_mass: torch.Tensor
    ) -> list[Choice]:
        """Let each policy choose; writes to its rows of ``log_mass`` float32 [B, Hq, M]."""
        return [self._choose(layer, selection, log_mass) for selection in selections]

    def _choose(self, layer: int, selection: Selection, log_mass: torch.Tensor) -> Choice:
        pages, policy = selection.pages, selection.policy
        heads, width = self.shape.num_kv_heads, log_mass.shape[-1]
        estimate = log_mass[selection.rows].unflatten(1, (heads, -1))
        stale = torch.zeros_like(pages.forced)
        if policy.reads_scores:
            stale = ~(estimate < torch.inf).all(2) & pages.exists
            pages = pages._replace(log_mass=estimate, forced=pages.forced | stale)
        if policy.keeps_sums:
            pages = pages._replace(sums=self.sums.read(layer, selection.picks, width))
        assert policy.select is not None
        chosen = policy.select(pages)
        value = estimate.clamp(min=-1e20) if policy.reads_scores else torch.zeros_like(estimate)
        value = torch.where(chosen[:, :, None], value, -torch.inf)
        value = torch.where(stale[:, :, None], torch.inf, value)
        log_mass[selection.rows] = value.flatten(1, 2)
        return Choice(selection, chosen | pages.forced, pages.log_mass)

    def account(
        self,
        layer: int,
        choices: Sequence[Choice],
        columns: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor | None,
        lse: torch.Tensor,
        batch: PageBatch,
        sm_scale: float,
    ) -> None:
        """After attention: put the rows' statistics right, and keep what later steps need.

        ``columns`` float32 [B, Hkv, 6] gets, of policies that read scores, the coverage by the
        estimates of all pages; of the others NaN for an unknown coverage.
        """
        for choice in choices:
            rows = choice.selection.rows
            mine = lse[rows].unflatten(1, (self.shape.num_kv_heads, -1))
            if choice.log_mass is None:
                columns[rows, :, COVERAGE] = torch.nan
            else:
                left = choice.selection.pages.exists & ~choice.attended
                columns[rows, :, COVERAGE] = estimated_coverage(mine, choice.log_mass, left)
            if choice.selection.policy.keeps_sums:
                assert k_cache is not None, "policies that keep sums are refused with a tier"
                self._observe(layer, choice, q, k_cache, lse, batch, sm_scale)

    def _observe(
        self,
        layer: int,
        choice: Choice,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        lse: torch.Tensor,
        batch: PageBatch,
        sm_scale: float,
    ) -> None:
        """Add the step's attention weights to the sums.

        Attention has these weights in passing; computing them again reads the attended keys a
        second time, which is no part of the method and is not counted.
        """
        keys = k_cache.unflatten(0, (-1, self.shape.page_size))
        weights = torch.zeros(choice.attended.shape, device=lse.device)
        windows = []
        for i, pick in enumerate(choice.selection.picks):
            length = choice.selection.lengths[i]
            count = -(-length // self.shape.page_size)
            weights[i, :, :count] = page_weights(
                q[pick.row],
                keys,
                lse[pick.row],
                batch.page_table[pick.row, :count].long(),
                choice.attended[i, :, :count],
                length,
                sm_scale,
            )
            budget = torch.tensor(pick.rule.budget_pages)
            local = local_pages(budget, self.config.sink_pages, self.config.recent_pages)
            windows.append(int(local) * self.shape.page_size)
        self.sums.add(layer, choice.selection.picks, weights, windows)
