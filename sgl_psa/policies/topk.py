"""A fixed number of pages of the largest scores: Quest with ``box``, ArkVale with ``cuboid_mean``.

Sources: Quest, arXiv 2406.10774; ArkVale, NeurIPS 2024. Query heads that share a KV head share the
pages: a page counts by its largest share among them. Sink and recent pages are part of the budget.
"""

from __future__ import annotations

import typing

import torch

from sgl_psa.config import ScorerName
from sgl_psa.policies.base import Candidates, Policy, chosen_row
from sgl_psa.policies.ranking import best, log_shares


def select(candidates: Candidates) -> torch.Tensor:
    """The best pages within ``budget``, those that are forced counted."""
    free = candidates.exists & ~candidates.forced
    room = candidates.budget - candidates.forced.sum(-1, keepdim=True)
    return best(log_shares(candidates).amax(2), free, room)


TOPK = Policy(
    "topk",
    chosen_row,
    limit="budget",
    select=select,
    scorers=("box", *(name for name in typing.get_args(ScorerName) if name != "box")),
)
