"""Twilight's pruning (arXiv 2502.02770): the smallest page set whose estimated mass reaches p.

The estimates alone decide; nothing that was attended corrects them. Each query head keeps its own
smallest set, forced pages counted first; heads that share a KV head read the union. The scorer must
estimate masses: with a bound or a best logit the shares would mean nothing.
"""

from __future__ import annotations

import torch

from sgl_psa.policies.base import Candidates, Policy, chosen_row
from sgl_psa.policies.ranking import log_shares


def select(candidates: Candidates) -> torch.Tensor:
    """Pages in falling order of their share, until what is left out is at most 1 - ``coverage``."""
    free = (candidates.exists & ~candidates.forced)[:, :, None]
    share = log_shares(candidates).exp() * free
    ordered, order = share.sort(dim=-1, stable=True)
    # Sums from the smallest up: exact where it matters, at coverages close to 1.
    if_dropped = ordered.cumsum(-1)
    needed = if_dropped > (1 - candidates.coverage)[:, :, None]
    chosen = torch.zeros_like(needed).scatter_(-1, order, needed)
    return (chosen & free).any(2)


TOP_P = Policy(
    "top_p",
    chosen_row,
    limit="coverage",
    select=select,
    scorers=("two_level", "rotated_sketch", "sketch", "hybrid", "gaussian", "mean", "exact"),
)
