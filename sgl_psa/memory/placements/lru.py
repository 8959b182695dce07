"""Least recently used, over all layers and requests: what SparseServe (2509.24626) evicts by."""

from __future__ import annotations

import torch
from sgl_psa_kernels.page_tier import TierTables

from sgl_psa.memory.placements.base import Placement, candidates, last_attended, lowest, padded


class LeastRecent(Placement):
    """The page attended longest ago goes first; pages never attended before all others."""

    name = "lru"

    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        frames = candidates(tables)
        chosen = frames[lowest(last_attended(tables, frames), count)]
        return torch.from_numpy(padded(chosen, count))[None]
