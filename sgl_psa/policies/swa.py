"""Sparse window attention of ALISA (arXiv 2403.17312), by pages.

Half of the budget is the local static part: the most recent pages. The rest is the global dynamic
part: of the other pages those with the largest sums of attention weights over the recent steps,
summed over the query heads of a KV head (see :class:`sgl_psa.attention_sums.AttentionSums`). A
page that is not attended gains nothing, so the choice is made of the past alone, not of the query.
ALISA begins with the sums of the prompt, which prefill does not keep here: the first decode step of
a request reads every page in their place. Sink pages are part of the budget.
"""

from __future__ import annotations

import torch

from sgl_psa.policies.base import Candidates, Policy, chosen_row
from sgl_psa.policies.ranking import best


def local_pages(budget: torch.Tensor, sink_pages: int, recent_pages: int) -> torch.Tensor:
    """Size of the local part for budgets int64: half, at least the recent pages."""
    return torch.minimum((budget // 2).clamp(min=recent_pages), budget - sink_pages)


def select(candidates: Candidates) -> torch.Tensor:
    """The local pages, and the pages of the largest sums; every page of rows without sums."""
    c = candidates
    assert c.sums is not None and c.fresh is not None, "the policy keeps sums"
    page = torch.arange(c.exists.shape[-1], device=c.exists.device)
    local = c.exists & (page >= c.pages - local_pages(c.budget, c.sink_pages, c.recent_pages))
    taken = local | c.forced
    room = c.budget - taken.sum(-1, keepdim=True)
    heavy = best(c.sums, c.exists & ~taken, room)
    return local | heavy | (c.fresh & c.exists)


SWA = Policy("swa", chosen_row, limit="budget", select=select, reads_scores=False, keeps_sums=True)
