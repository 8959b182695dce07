"""Least demand first: selection frequency that fades, then recency.

Demand is how many KV heads attended a page in how many steps since it came; every ``HALF_LIFE``
steps it is halved. Pages are ordered by how many halvings they would survive, pages of one such
class by the step that attended them last. All layers compete, so one of flat attention, whose pages
many heads select, keeps more frames.

Counting with decay is LRFU (Lee et al., IEEE Trans. Comput. 2001); a generalised clock (Smith,
1978), which halves what its hand passes, forgets the faster the more is evicted, and loaded 12 %
more here in arenas of a quarter of the KV and a tenth more at an eighth of it.
"""

from __future__ import annotations

import numpy as np
import torch
from sgl_psa_kernels.page_tier import TierTables

from sgl_psa.memory.placements.base import Placement, candidates, last_attended, lowest, padded

#: Decode steps after which demand counts half. Of 8, 16 and 32 the one that is never the worst
#: between a tenth and half of the KV.
HALF_LIFE = 16
#: Above the bits of a stamp and those of the order of coming that are left to tell stamps apart.
_CLASS_SHIFT = 58
_DROPPED_BITS = 5


class Demand(Placement):
    """The order that the module's text gives."""

    name = "demand"

    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        frames = candidates(tables)
        # The exponent of a float is the bit length of the integer, 0 for 0.
        halvings = np.frexp(tables.uses.numpy()[frames].astype(np.float64))[1].astype(np.int64)
        key = (halvings << _CLASS_SHIFT) + (last_attended(tables, frames) >> _DROPPED_BITS)
        return torch.from_numpy(padded(frames[lowest(key, count)], count))[None]

    def age(self, tables: TierTables, step: int) -> None:
        if step % HALF_LIFE == 0:
            uses = tables.uses.numpy()
            uses >>= 1
