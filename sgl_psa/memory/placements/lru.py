"""Least recently used, over all layers and requests: what SparseServe (2509.24626) evicts by."""

from __future__ import annotations

import torch
from sgl_psa_kernels.page_tier import TierTables

from sgl_psa.memory.placements.base import Placement, candidates, least_recent, padded


class LeastRecent(Placement):
    """The page attended longest ago goes first; pages never attended before all others."""

    name = "lru"

    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        chosen = least_recent(tables, candidates(tables), count)
        return torch.from_numpy(padded(chosen, count))[None]
